"""Tiers on the command line: which flags describe the memories of workers, and the study of caches.

flags    the flags of the verbs about placements, and the memories that they describe
caches   `emoe simulate --cache`: traces through caches of experts
"""
