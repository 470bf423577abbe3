"""What advantage shapers ask of the domain: rewards, answers, judges, a search agent."""
