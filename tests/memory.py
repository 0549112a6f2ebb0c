"What a call allocates"
from torch.profiler import ProfilerActivity, profile


def peak(step):
    "Most bytes that a call has allocated at a time"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: step()
    now = most = 0
    for e in sorted((e for e in p.profiler.kineto_results.events() if e.name() == '[memory]'), key=lambda e: e.start_ns()):
        now += e.nbytes()
        most = max(most, now)
    return most
