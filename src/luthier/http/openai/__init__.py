"""OpenAI's API beside chat: files, models, jobs; one module a resource, each with a router of its own."""
