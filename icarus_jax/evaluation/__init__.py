"""Evaluates models on task sets, runs batch files, and finds the kind that an adapter should be served as.

Owns: prompts and scores of the tasks, the sandbox for generated programs, result files that survive a kill, and the
endpoints of files and batches. Takes: rows of a task, or an OpenAI batch file. Gives: one line for each answer, and a
report of scores.
Parts: task_evaluation (task_sets), run (batch), run_program (sandbox), measure and recommend (kind_check), BatchRoutes
(batch_routes).
"""
