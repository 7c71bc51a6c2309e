"""What rides on a worker's loop and can be taken away."""
