"""Applications that worker processes of the tests load."""
