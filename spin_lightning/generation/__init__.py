"""Generation engines: prompts and a policy in, sampled responses out."""
