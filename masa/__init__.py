"""MASA: while a model learns to solve problems it also learns to foresee how (arXiv 2510.03259; v2 calls it MAPR).

For every problem the model writes G solutions and M metas. A meta foresees three things about those solutions: the
share that will be right, how many tokens a right one takes, which notions it uses. What the solutions turn out to be is
the only ground truth there is for that; the problem's answer rewards the solutions. Both kinds are normalised in their
own group and trained by one policy gradient. Once foresight is good it saves work: problems that are foreseen as all
right or all wrong are not sampled (gate), solutions far beyond the foreseen length are cut (cutoff), foreseen notions
become hints.

Read in this order, which is the order of a step:

    settings.py    every setting, and the presets that name the paper's variants
    problems.py    a problem, its two prompts, how a meta is written and read
    rewards.py     what a solution and a meta earn: the paper's section 3 (no torch)
    control.py     gate, cutoff and hint (no torch)
    objective.py   advantages, clip and dual clip, log-probabilities
    rollouts.py    the records of a step
    experts.py     metas with their numbers corrected, for cloning
    step.py        one step: sample, grade, score, update, clone experts
    metrics.py     what a step counts
    own_reward.py  a reward function of one's own
    run.py         all steps: checkpoints, resume, evaluation, command line
    samples.py     samples of a run to look at
    passk.py       Pass@k, calibration and Shapley shares of finished evaluations

Left out: an entropy bonus (off in the paper), value models, sharding.
"""
