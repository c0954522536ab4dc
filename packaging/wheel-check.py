"""What a user does with the wheel, in the fresh environment that it was installed into.

Starts pegaflowd by its console script, saves and loads through the client, compares every byte,
asks pegactl, stops the daemon. Run it with that environment's Python, outside the source tree.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pegaflow
from pegaflow.client import Group, Namespace, Options, connect, library_version

BOUND_MS = 30_000
BLOCKS, BLOCK_BYTES = 64, 4096


def main():
    package = Path(pegaflow.__file__).resolve()
    scripts = Path(sys.executable).parent
    assert Path(sys.prefix).resolve() in package.parents, f"{package} is not the installed one"
    assert (package.parent / "py.typed").exists()
    assert library_version() == pegaflow.__version__
    for program in ("pegaflowd", "pegactl"):
        said = subprocess.run(
            [scripts / program, "--version"], check=True, capture_output=True, text=True
        ).stdout
        assert said.split()[:2] == [program, pegaflow.__version__], said

    folder = Path(tempfile.mkdtemp(prefix="pegaflow-wheel-"))
    node = f"wheel-{os.getpid()}"
    os.environ |= {"PEGAFLOW_NODE": node, "PEGAFLOW_SOCKET": str(folder / "daemon.sock")}
    daemon = subprocess.Popen(
        [scripts / "pegaflowd", "--pool-size", "64MiB", "--extent-size", "4MiB", "--http", "off"]
    )
    try:
        end = time.monotonic() + BOUND_MS / 1000
        while not (folder / "daemon.sock").exists():
            assert daemon.poll() is None and time.monotonic() < end, "the daemon does not come up"
            time.sleep(0.02)
        save_and_load()
        subprocess.run([scripts / "pegactl", "status"], check=True)
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(BOUND_MS / 1000) == 0
        # The library finds the daemon of the wheel beside itself.
        with connect(Options(autostart=True, connect_timeout_ms=BOUND_MS)) as client:
            client.wait(client.nop(), BOUND_MS).check()
        stop_what_was_started(folder)
    finally:
        daemon.kill()
        shutil.rmtree(folder)
        shutil.rmtree(Path("/dev/shm/pegaflow") / node, ignore_errors=True)
    print(f"pegaflow {pegaflow.__version__} in {sys.prefix}: every byte right")


def save_and_load():
    namespace = Namespace(block_tokens=16, model="check", dtype="uint8", hash_algorithm="check")
    hashes = [bytes([at]) * 32 for at in range(BLOCKS // 2)]
    with connect() as client:
        kv = client.alloc_host(BLOCKS * BLOCK_BYTES).view()
        content = os.urandom(BLOCKS // 2 * BLOCK_BYTES)
        kv[: len(content)] = content
        group = Group.of(kv.cast("B", [BLOCKS, BLOCK_BYTES]))
        with client.register_worker("check", namespace, [group]) as worker:
            worker.wait_ready(BOUND_MS)
            client.wait(worker.save(hashes, range(len(hashes))), BOUND_MS).check()
            found = client.wait(worker.query(1, hashes), BOUND_MS).check()
            assert found.count == len(hashes)
            targets = range(len(hashes), BLOCKS)
            client.wait(worker.load(found.lease, targets), BOUND_MS).check()
            assert bytes(kv[len(content) :]) == content


def stop_what_was_started(folder):
    """The daemon of autostart is no child of this process."""
    wanted = str(folder / "daemon.sock").encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            try:
                if wanted in (entry / "cmdline").read_bytes():
                    os.kill(int(entry.name), signal.SIGTERM)
            except OSError:
                continue
    end = time.monotonic() + BOUND_MS / 1000
    while (folder / "daemon.sock").exists():
        assert time.monotonic() < end, "the daemon that autostart began does not stop"
        time.sleep(0.02)


if __name__ == "__main__":
    main()
