"""Flow control: deadlines, unique tasks, limits of concurrency and rate; what each promises is in docs/flow-control.md."""
