"""The execution pools that come with amqtask; a worker imports only the one it was told to use."""
