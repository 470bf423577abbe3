"""Domain of the advantage shapers: rewards, answers, judges, a search agent."""
