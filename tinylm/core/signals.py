"""How terminals and schedulers announce that a program is to end.

SIGTERM comes from Kubernetes, Slurm and clouds, SIGINT from Ctrl-C, SIGHUP where a connection or a
terminal is gone, SIGUSR1 and SIGUSR2 from Slurm's --signal, Grid Engine's -notify and LSF, SIGXCPU
at a limit of CPU time.
"""

import signal

SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)


def is_ignored(number: int) -> bool:
    """Say whether the program that started this one wants a signal ignored, as nohup does.

    SIGTERM always counts.
    """
    return number != signal.SIGTERM and signal.getsignal(number) == signal.SIG_IGN
