"""Fine-tuning jobs in OpenAI's sense: each is an ordinary luthier run that waits its turn in the database.

`asked` reads a request, `examine` its files, `spec` makes the recipe, `queue` keeps rows, leases and events,
`work` starts a process for each job that may begin, `child` is that process. Source of states, fields and
messages: https://platform.openai.com/docs/api-reference/fine-tuning; what is honoured, recorded or refused
stands in `docs/decisions/0010-openai-jobs.md`. It does not know HTTP.
"""
