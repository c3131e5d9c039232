"""MT-Bench: questions, answers, judge and scores."""
