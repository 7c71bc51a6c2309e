"""What a monitor sees: a worker with -E in this process, a receiver, a state, and an event of a task's own."""
