"""Services on a worker's loop; the worker runs without them, too."""
