"""Known returns that results are measured against; imports nothing, so that no extra is needed to read them."""

#: Best possible mean return over random starts, by dynamic programming over a fine grid (20,000 starts, standard error 0.5)
OPTIMA = {"Pendulum-v1": -137.6}
#: Returns to be reached, where Gymnasium names none
THRESHOLDS = {"Pendulum-v1": -200.0}
#: The average episodic return that the article reports in the end (section 5), and after how many iterations
ARTICLE_RETURN, ARTICLE_ITERATIONS = -76.99, 10_000
