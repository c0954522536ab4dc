//! Whether a process is the one that wrote a file, and what it used of the CPU.

#![forbid(unsafe_code)]

/// What `/proc/<pid>/stat` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcStat {
    /// One letter: `R`, `S`, `T`, `Z` …
    pub state: char,
    /// Start of the process in clock ticks since the kernel booted.
    pub start_ticks: u64,
    /// CPU time used in user mode, in clock ticks.
    pub user_ticks: u64,
    /// CPU time used in the kernel, in clock ticks.
    pub system_ticks: u64,
}

impl ProcStat {
    /// Reads it; `None` when there is no such process.
    pub fn read(pid: u32) -> Option<ProcStat> {
        ProcStat::parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// Field numbers as in proc(5), from 1; the name (2) may hold spaces and brackets.
    fn parse(text: &str) -> Option<ProcStat> {
        let rest = &text[text.rfind(')')? + 1..];
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let number = |field: usize| fields.get(field - 3)?.parse().ok();
        Some(ProcStat {
            state: fields.first()?.chars().next()?,
            user_ticks: number(14)?,
            system_ticks: number(15)?,
            start_ticks: number(22)?,
        })
    }

    /// CPU time in seconds, user and kernel.
    pub fn cpu_seconds(&self) -> f64 {
        let ticks_per_second = rustix::param::clock_ticks_per_second().max(1);
        (self.user_ticks + self.system_ticks) as f64 / ticks_per_second as f64
    }
}

/// State of the process that wrote a node file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    /// It runs or can run.
    Alive,
    /// It exists but is halted (SIGSTOP, debugger).
    Stopped,
    /// It is gone, or another process has its number now.
    Dead,
}

impl Liveness {
    /// Looks at process `pid`, which is the right one only if it started at `start_ticks`.
    pub fn of(pid: u32, start_ticks: u64) -> Liveness {
        match ProcStat::read(pid) {
            Some(stat) if stat.start_ticks != start_ticks => Liveness::Dead,
            Some(ProcStat {
                state: 'Z' | 'X' | 'x',
                ..
            })
            | None => Liveness::Dead,
            Some(ProcStat {
                state: 'T' | 't', ..
            }) => Liveness::Stopped,
            Some(_) => Liveness::Alive,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_does_not_shift_the_fields() {
        let text = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 50 60 0 0 20 0 1 0 777 1 1";
        let stat = ProcStat::parse(text).unwrap();
        assert_eq!(
            (stat.state, stat.user_ticks, stat.system_ticks),
            ('S', 50, 60)
        );
        assert_eq!(stat.start_ticks, 777);
    }

    #[test]
    fn a_recycled_process_id_is_not_the_daemon() {
        let own = std::process::id();
        let stat = ProcStat::read(own).unwrap();
        assert_eq!(Liveness::of(own, stat.start_ticks), Liveness::Alive);
        assert_eq!(Liveness::of(own, stat.start_ticks + 1), Liveness::Dead);
    }
}
