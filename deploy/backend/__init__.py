"""The cluster as the API sees it: requests go to the engine and tokens come back; the coordinator answers questions.

backend          the interface of the API to the cluster
groups           that interface over the groups of a cluster
directory        how many groups there are to be
router           gives requests to the groups' engines, and moves them from a group that is lost
routing          which group a request goes to; pure
ray_backend      one group on Ray: the coordinator's answers, and whether the group can serve
engine_client    the requests at an engine, which go on with the next engine after a loss
request_stream   a running request: the tokens that it has, and those that nobody has read yet
ray_calls        the results of calls to actors
gcs_watch        whether Ray's GCS answers, without which Ray ends processes
check_in         a replica's reports to the coordinator
hand_over        a replica of a redeploy takes over from those before it
"""
