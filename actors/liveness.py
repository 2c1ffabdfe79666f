"""Who waits for whom, and for how long: every time-out by which a process is found late, hanging or gone.

A process that dies is mostly noticed at once, because a connection to it or a call to it ends. These times are for what
ends nothing: a process that hangs, a machine that is cut off. Times of decisions (how long workers wait for one another
before an epoch begins) are in cluster/decisions/reconcile.py. Times that the user sets are settings, in
cluster/config.py.

The coordinator's state machine looks at the clock every TICK_S. A standby is started STANDBY_AFTER_S after an epoch has
begun. A process that has not begun to load after STARTING_S is said to wait for a GPU or a core where none is free, and
after WAITING_FOR_RESOURCES_S in any case.

    who waits        for what                                 how long                          and then
    ---------------  ---------------------------------------- --------------------------------- ----------------------
    coordinator      a sign of life of a worker, of the       heartbeat_timeout (setting),      the process is ended
                     engine; asked for every POLL_S           in two halves
    coordinator      the same of a worker that loads          LOADING_PATIENCE times that       the worker is ended
    coordinator      a worker with a late step; the standby   SUSPECT_TIMEOUT_S                 the worker is ended
                     before it is used
    coordinator      workers after a failed step, transfer,   heartbeat_timeout, or RAY_KNOWS_S the worker is ended
                     prepare or commit                        where its listener is gone
    coordinator      a worker's answer to prepare             step_timeout (setting)            the change is given up
    coordinator      a worker to open a door or a rendezvous  DOOR_S                            the change is given up
    coordinator      the engine's answer to an epoch          COMMIT_STEPS x step_timeout       the engine is ended
                                                              + COMMIT_MARGIN_S
    coordinator      the migrator, while it copies            PROBE_TIMEOUT_S, twice            the migrator is ended
    coordinator      the engine's epoch, after a restart      PROBE_TIMEOUT_S                   the flip has failed
    coordinator      workers that must drop something         NOTIFY_TIMEOUT_S                  nothing, they are polled
    coordinator      the standby to have imported its model   STANDBY_TIMEOUT_S                 the standby is ended
    coordinator      a planner                                PLAN_STEPS x plan_deadline        the plan is given up
                                                              + PLAN_MARGIN_S
    engine           a step, before it asks who lives         LATE_FACTOR times the slowest of  the coordinator is asked
                                                              its size lately, LATE_FLOOR_S     to look at the workers
                                                              at least
    engine           a step                                   as above, FLOOR_S at least,       the step has failed
                                                              step_timeout at most
    engine           workers to give a failed step up         SILENT_S, then ABORT_S in all     they are suspects
    engine           an API replica that has hung up          CLIENT_S                          its requests are aborted
    engine           a replica to store a lasting request     KEPT_S                            its answer is forgotten
    worker           the thread of its steps, when asked      STEP_PING_S                       it says a step hangs
    migrator         a copy of one expert                     COPY_TIMEOUT_S                    the transfer has failed
    watcher          a process of Ray's to register           as long as it lives               it runs it again
    whoever listens  the token of a new connection            TOKEN_S                           it hangs up
    whoever connects a connection                             CONNECT_S                         it tries again later
    both ends        the other machine (TCP keep-alive)       TCP_KEEP_ALIVE: 10 + 3 x 5 s      the connection has ended
    API              a sign of life of the engine,            LIFE_S                            it looks for another
                     asked for every LIFE_S
    API              a sign of life of the coordinator        HANG_S                            Ray restarts it
    API              a group that cannot serve, while         MOVE_S                            its requests go on in
                     another group can                                                          another group
    API              a dry run of a planner                   the planner's time-out            the request has failed
                                                              + CALL_TIMEOUT_S
    API              responses in progress that no replica    ADOPT_S between two looks         it follows them
                     follows
    API              the coordinator, when it checks in       CHECK_IN_S, then HANG_S           it checks in again
    coordinator      an API replica, when the server stops    AWAY_S                            it waits for it no more
    API              any other answer                         CALL_TIMEOUT_S                    the request has failed
    API              a process that makes prompts, compiles   STOPPED_S, or BLOCKED_S without   it is ended, and another
                     grammars or reads large requests; the    work (actors/stillness.py), seen  one is asked
                     one that forks it; such one to start     every HELPER_LOOK_S
    coordinator      a planner, or a process that describes   STOPPED_S                         the same
                     the model, that is stopped
"""

from __future__ import annotations

# --- The coordinator's polls ----------------------------------------------------------------------------------------

TICK_S = 0.5
"""Seconds between two looks of the state machine at the clock."""
POLL_S = 1.0
"""Seconds between two questions to each worker and to the engine."""
LOADING_PATIENCE = 4.0
"""A worker that loads may be late by so many times a heartbeat's time-out: imports hold its threads up."""
STARTING_S = 3.0
"""A process that has not begun to load by then may wait for a GPU or core: Ray is asked whether one is free."""
WAITING_FOR_RESOURCES_S = 30.0
"""A process that has not begun to load by then is said to wait for a free GPU or core."""

# --- The coordinator's calls ----------------------------------------------------------------------------------------

PROBE_TIMEOUT_S = 5.0
RAY_KNOWS_S = 0.25
"""Seconds for Ray to say what ended a process whose listener is gone."""
SUSPECT_TIMEOUT_S = 2.0
"""Seconds for a process that another sign already makes suspect."""
NOTIFY_TIMEOUT_S = 10.0
DOOR_S = 10.0
"""Seconds for a worker to open a listener, by which the others of a group find it."""
STANDBY_AFTER_S = 3.0
"""A standby is started once an epoch has served for so many seconds: starting takes some seconds of a core."""
STANDBY_TIMEOUT_S = 60.0
COMMIT_STEPS = 2
"""Time-outs of a step: a step that hangs has to end first, and then a worker may hang in the commit."""
COMMIT_MARGIN_S = 30.0
PLAN_STEPS = 2
"""A planner that takes so many times its deadline is given up."""
PLAN_MARGIN_S = 30.0


def plan_timeout_s(plan_deadline_s: float) -> float:
    """Seconds after which the coordinator gives a planner up that may take `plan_deadline_s`."""
    return PLAN_STEPS * plan_deadline_s + PLAN_MARGIN_S


def dry_run_timeout_s(plan_deadline_s: float) -> float:
    """Seconds that the API waits for a dry run: the coordinator, which can say what went wrong, gives up earlier."""
    return plan_timeout_s(plan_deadline_s) + CALL_TIMEOUT_S


# --- Steps ----------------------------------------------------------------------------------------------------------

LATE_FACTOR = 10.0
"""A step may take so many times the duration of the slowest recent step of its size."""
LATE_FLOOR_S = 1.0
"""Least seconds before the workers of a step are pinged. A ping costs next to nothing."""
FLOOR_S = 10.0
"""Least seconds before a step is given up. Giving up a step that would have ended costs a new process group."""
SILENT_S = 1.0
"""Seconds that workers get to give a failed step up, before they are asked whether they live."""
ABORT_S = 5.0
"""Seconds that they get in all."""
STEP_PING_S = 30.0
"""Longest that a call to a worker waits for the thread of its steps. Whoever asks gives up earlier."""

# --- Copies and connections -----------------------------------------------------------------------------------------

COPY_TIMEOUT_S = 60.0
"""Seconds for the copy of one expert."""
CONNECT_S = 5.0
TOKEN_S = 5.0
"""Seconds within which a connection must send its whole token."""
CLIENT_S = 60.0
KEPT_S = 600.0
"""Seconds that an engine keeps the answer of a lasting request after its end, for a replica to store it."""
TCP_KEEP_ALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
"""Half a minute in all, in seconds, seconds and probes."""

# --- The API --------------------------------------------------------------------------------------------------------

CALL_TIMEOUT_S = 30.0
MOVE_S = 1.0
"""A group that has lost some of its workers serves again sooner, and then its requests need not be computed again."""
LIFE_S = 10.0
"""Seconds for an engine's sign of life. A dead engine closes its connection; a hanging engine does not."""
ADOPT_S = 5.0
CHECK_IN_S = 1.0
"""Longest that the coordinator holds an API replica's call, to answer it as soon as the server stops."""
AWAY_S = 10.0
"""Seconds without a check-in after which an API replica is gone. While the server stops they begin with the stop."""
HANG_S = 10.0
"""Seconds without a sign of life after which a coordinator that answered before is taken to hang."""

# --- Helper processes -----------------------------------------------------------------------------------------------

HELPER_LOOK_S = 0.5
"""Seconds between two looks at a process for which a request waits."""
STOPPED_S = 5.0
"""Seconds for which it may be stopped. Whatever stops a whole server for longer stops whoever looks as well."""
BLOCKED_S = 30.0
"""Seconds for which it may neither use the processor, nor wait for it, nor bring in a page."""
