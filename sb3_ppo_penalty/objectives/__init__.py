"""
What an update maximises and measures: losses, divergences, the KL penalty and its controllers, as pure functions.

"The article" is the one that this project implements, https://www.cnblogs.com/xingzheai/p/15931681.html; "the paper" is
Schulman et al. 2017, Proximal Policy Optimization Algorithms, https://arxiv.org/abs/1707.06347. Docstrings give the section.
"""
