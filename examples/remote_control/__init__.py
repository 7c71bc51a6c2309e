"""A running worker is asked and told things, among them commands of the application's own."""
