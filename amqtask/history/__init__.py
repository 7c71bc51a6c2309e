"""History: what happened to tasks, kept in an index that can be searched. `app.history` is `client.History`."""
