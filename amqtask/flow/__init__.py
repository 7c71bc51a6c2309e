"""Flow control: deadlines, unique tasks, limits of concurrency and rate; what each promises is in docs/flow-control.md.

A task says what it wants with an option (protocol.flow_options, `deadline`). `keys` makes of its arguments the keys of a store
that all callers and workers share (`contract`, `memory`, `redis`, `sql`). Callers take a unique task's key when they publish it
(`claims`); a slot asks for all that its task needs just before it runs it, in one step (`gate`), and gives it back when it has
ended.
"""

from amqtask.protocol.flow_options import Concurrency, Rate, Unique

__all__ = ["Concurrency", "Rate", "Unique"]
