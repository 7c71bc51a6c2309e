"""Where messages go: routes, delay levels, and the plan of declarations they need."""
