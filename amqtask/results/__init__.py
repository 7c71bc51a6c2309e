"""What the results of several calls share."""
