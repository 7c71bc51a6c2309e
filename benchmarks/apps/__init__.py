"""One small application per system, each with the same verbs; see benchmarks.measure."""
