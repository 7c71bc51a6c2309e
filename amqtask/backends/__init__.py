"""Result stores: where the outcome of a task waits for whoever asks."""
