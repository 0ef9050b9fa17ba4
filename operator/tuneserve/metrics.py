"""Every metric of the operator, by name, in one place: what the alerts and dashboards may rely on."""

from prometheus_client import Counter, Gauge, Histogram

QUEUE_DEPTH = Gauge("tuneserve_queue_depth", "Objects that wait for a reconcile.")
QUEUE_DELAYED = Gauge("tuneserve_queue_delayed", "Objects whose next reconcile has a date.")
QUEUE_RUNNING = Gauge("tuneserve_queue_running", "Reconciles that run now.")
QUEUE_OLDEST = Gauge("tuneserve_queue_oldest_seconds", "How long the object that waits longest has waited.")
QUEUE_ADDS = Counter("tuneserve_queue_adds_total", "Objects added to the queue, duplicates included.", ["kind"])
QUEUE_WAIT = Histogram(
    "tuneserve_queue_wait_seconds",
    "From the moment an object is due to the start of its reconcile.",
    ["kind"],
    buckets=(0.005, 0.02, 0.1, 0.5, 1, 5, 15, 60, 300),
)
RECONCILE_SECONDS = Histogram(
    "tuneserve_reconcile_seconds",
    "Duration of one reconcile.",
    ["kind"],
    buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120),
)
RECONCILES = Counter(
    "tuneserve_reconciles_total", "Finished reconciles; result is success or error.", ["kind", "result"]
)
RETRIES = Counter("tuneserve_queue_retries_total", "Reconciles that failed and were put back with a delay.", ["kind"])

KUBE_REQUESTS = Counter(
    "tuneserve_kube_requests_total",
    "Requests to the API server, retries included; code is the HTTP status, or `error` without an answer.",
    ["verb", "kind", "code"],
)
KUBE_SECONDS = Histogram(
    "tuneserve_kube_request_seconds",
    "Duration of one request to the API server.",
    ["verb"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 30),
)

WATCH_EVENTS = Counter("tuneserve_watch_events_total", "Watch events, by the kind of the object watched.", ["kind"])
LEADER = Gauge("tuneserve_leader", "1 while this process holds the lease.")
LOOP_LAG = Gauge("tuneserve_event_loop_lag_seconds", "How late the last timer of the event loop was.")
