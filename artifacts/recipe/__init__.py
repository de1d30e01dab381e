"""How the embedded demo is made: prompts, answers, model, training pairs, evaluation."""
