"""The OpenAI-compatible routes: request bodies, replies, jobs and their content."""
