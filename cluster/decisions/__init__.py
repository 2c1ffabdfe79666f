"""What is decided from the facts and the time alone. Each decision comes with its reason; who owns what is elsewhere.

reconcile     which workers to start or keep, which serve, and which experts they hold
joining       workers that cannot join the others: who is tried next, and who is given up
spreading     which workers move to nodes that came later
autoscaling   how many workers a load is worth
replacing     which placements a re-placement may go to, and whether a plan is carried out
trials        whether a re-placement that was carried out is undone
limits        what a configuration may ask of a model
status        readiness, and the progress of an operation

The owners of the facts, who carry the decisions out, are in cluster/control/.
"""
