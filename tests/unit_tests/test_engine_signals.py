"""A job's signals reach every process: those that vLLM starts must outlive them too."""

import subprocess
import sys

SCRIPT = """
import multiprocessing, os, signal, sys, time
from megatron_tropd.base.exits import STOP_SIGNALS
from megatron_tropd.rollout.engines.child import shield_children

def work(connection):
    # As vLLM's WorkerProc.worker_main does.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit("ended"))
    connection.send("ready")
    connection.recv()
    connection.send("alive")

for method in ("fork", "spawn"):
    if __name__ == "__main__":
        shield_children()
        context = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        assert ours.recv() == "ready"
        for number in STOP_SIGNALS:
            os.kill(process.pid, number)
        time.sleep(0.2)
        ours.send(None)
        print(method, ours.recv(), flush=True)
        process.kill()
"""


def test_workers_with_handlers_of_their_own_outlive_the_signals(tmp_path):
    script = tmp_path / "engine.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "fork alive\nspawn alive\n", done.stderr
