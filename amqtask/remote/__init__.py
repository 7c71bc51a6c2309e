"""Remote control, the client's end: what workers can be asked and told."""
