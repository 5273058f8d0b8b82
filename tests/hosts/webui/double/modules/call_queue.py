"""One job at a time (the webuis': a FIFO lock)."""

import threading

queue_lock = threading.RLock()
