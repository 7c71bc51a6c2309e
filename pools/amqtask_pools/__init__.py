"""The execution pools that come with amqtask; a worker imports only the one that it uses."""
