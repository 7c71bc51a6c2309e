"""An application's tasks for programs in other languages: JSON Schema, AsyncAPI, a producer in TypeScript."""
