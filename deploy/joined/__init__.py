"""For a Ray cluster that others start (`ray up`, KubeRay, `ray start`): what its nodes need so that Serve there listens
and answers as it does for `emoe serve` on one machine.

environment   the variables with which `ray start` runs; `emoe cluster-env` prints them, and the image has them
notice        ends `ray start` in good order when a cloud takes the machine away
haproxy       the command `emoe-haproxy`, which Serve runs in place of HAProxy
"""
