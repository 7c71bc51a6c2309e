"""For users and plug-in authors: `apps`, `worker` and `process` to test with, `suites` for plug-ins of one's own."""
