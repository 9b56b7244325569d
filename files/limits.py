"""Names the limit of the shell or the container that an error has met."""

import errno
import resource

_LIMITS = {errno.EMFILE: ("NOFILE", "-n"), errno.EFBIG: ("FSIZE", "-f"), errno.EAGAIN: ("NPROC", "-u"),
           errno.ENOMEM: ("AS", "-v")}  # fmt: skip


def limit_behind(error: BaseException | None) -> str:
    """Returns "; RLIMIT_NOFILE is 32: raise it (ulimit -n)" if that limit ended a call, else ""."""
    while error:
        number = getattr(error, "errno", None)
        if "can't start new thread" in str(error):  # a RuntimeError without a number
            number = errno.EAGAIN
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            number = errno.ENOMEM
        if number in _LIMITS:
            name, option = _LIMITS[number]
            limit = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0]
            if number == errno.ENOMEM and limit == resource.RLIM_INFINITY:
                return ""
            return f"; RLIMIT_{name} is {limit:,}: raise it (ulimit {option})"
        error = error.__cause__
    return ""
