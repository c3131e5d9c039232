"""Generation: prompts and a policy in, sampled responses out."""
