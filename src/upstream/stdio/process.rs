//! A process group that cannot outlive us, not even when we are killed.
//!
//! Every child gets a process group of its own, and in it a *watcher*: a fork that does nothing but read from the
//! "life" pipe, whose only write end is ours. When it reads a byte, we want the group to end; when it reads the end
//! of the pipe, we are dead, however we died. Either way it sends SIGTERM to its group, waits, and sends SIGKILL.
//!
//! Two things come with that. A group's id cannot be given to others while a member lives, so the watcher keeps the
//! id ours after the child itself has ended, and signals cannot hit strangers. And when the pipe has no reader any
//! more, the watcher is gone, and with it, by its own doing, everything else in the group. Who left the group, with
//! `setsid`, is not followed.
//!
//! This is the only file with `unsafe` in it. `PR_SET_PDEATHSIG` would be shorter, but it fires when the *thread*
//! that forked ends, and it does not reach grandchildren.

#![allow(unsafe_code)]

use std::{
    io::{self, PipeWriter, Write as _},
    os::{
        fd::{AsRawFd as _, RawFd},
        unix::process::CommandExt as _,
    },
    process::Command,
    time::Duration,
};

/// How often the watcher looks whether the group has ended.
const STEP: Duration = Duration::from_millis(20);

/// A child's process group.
#[derive(Debug)]
pub(super) struct Group {
    id: libc::pid_t,
    life: PipeWriter,
}

/// Starts `command` in a watched group of its own. After SIGTERM the group has `grace` before SIGKILL.
pub(super) fn spawn(mut command: Command, grace: Duration) -> io::Result<(tokio::process::Child, Group)> {
    let (life, ours) = io::pipe()?;
    let fd = life.as_raw_fd();
    let steps = u32::try_from(grace.as_millis() / STEP.as_millis()).unwrap_or(u32::MAX).max(1);
    command.process_group(0);
    // SAFETY: the closure runs in the forked child of a process with threads. It only makes system calls, and neither
    // allocates nor takes locks. `fd` is open there, because `life` is dropped only after the spawn.
    unsafe { command.pre_exec(move || start_watcher(fd, steps)) };
    let child = tokio::process::Command::from(command).spawn()?;
    drop(life);
    let id = child.id().and_then(|id| id.try_into().ok()).ok_or(io::ErrorKind::NotFound)?;
    Ok((child, Group { id, life: ours }))
}

impl Group {
    /// Asks the watcher to end the group: SIGTERM, and after the grace SIGKILL.
    pub(super) fn end(&self) {
        // When nobody reads, the group has ended.
        let _ = (&self.life).write(&[1]);
    }

    /// Whether the watcher has left, after everybody else.
    pub(super) fn is_gone(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.life.as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: `poll` is one valid `pollfd`, and the count says one.
        let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
        ready > 0 && poll.revents & (libc::POLLERR | libc::POLLHUP) != 0
    }

    /// Sends SIGKILL to the group. Only for when the watcher failed and the child has not been waited for: then the id
    /// is still ours.
    pub(super) fn kill(&self) {
        // SAFETY: no memory is involved.
        unsafe { libc::kill(-self.id, libc::SIGKILL) };
    }

    /// Collects those of the group that became our children when their parents ended. That happens when we are the
    /// container's first process. Returns whether any are left.
    pub(super) fn reap(&self) -> bool {
        loop {
            // SAFETY: a null status is allowed.
            match unsafe { libc::waitpid(-self.id, std::ptr::null_mut(), libc::WNOHANG) } {
                0 => return true,
                pid if pid > 0 => {}
                _ => return false,
            }
        }
    }
}

/// Runs between fork and exec, in the child: forks the watcher by way of a process that ends at once, so that the
/// child never gets to see a child it did not start.
fn start_watcher(life: RawFd, steps: u32) -> io::Result<()> {
    // SAFETY: only system calls that are async-signal-safe; this process has one thread.
    unsafe {
        match libc::fork() {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                // Before the watcher exists, so that there is no moment in which a signal would end it.
                for signal in [
                    libc::SIGTERM,
                    libc::SIGINT,
                    libc::SIGHUP,
                    libc::SIGQUIT,
                    libc::SIGPIPE,
                    libc::SIGUSR1,
                    libc::SIGUSR2,
                    libc::SIGALRM,
                    libc::SIGTSTP,
                    libc::SIGTTIN,
                    libc::SIGTTOU,
                ] {
                    libc::signal(signal, libc::SIG_IGN);
                }
                match libc::fork() {
                    -1 => libc::_exit(1),
                    0 => watch(life, steps),
                    _ => libc::_exit(0),
                }
            }
            between => {
                let mut status = 0;
                while libc::waitpid(between, &raw mut status, 0) == -1 {
                    if io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
                        return Err(io::Error::last_os_error());
                    }
                }
                match status {
                    0 => Ok(()),
                    _ => Err(io::Error::from_raw_os_error(libc::EAGAIN)),
                }
            }
        }
    }
}

/// The watcher. It holds nothing of what it was forked from but the read end of the life pipe.
///
/// # Safety
///
/// For a freshly forked process with one thread.
unsafe fn watch(life: RawFd, steps: u32) -> ! {
    // SAFETY: only system calls that are async-signal-safe, on memory of this stack frame.
    unsafe {
        #[cfg(target_os = "linux")]
        libc::prctl(libc::PR_SET_NAME, c"portcullis-dog".as_ptr());
        if life != 0 {
            libc::dup2(life, 0);
        }
        close_from(1);
        libc::chdir(c"/".as_ptr());
        let mut byte = 0_u8;
        while libc::read(0, (&raw mut byte).cast(), 1) == -1 {
            if io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
                break;
            }
        }
        let group = libc::getpgrp();
        libc::kill(-group, libc::SIGTERM);
        for _ in 0..steps {
            // Only from outside can one see whether a group is empty. It is left for a moment, in which its id
            // could be given away only if it is; then joining it again fails, for that would be another session.
            if libc::setpgid(0, 0) == 0 {
                let empty = libc::kill(-group, 0) == -1
                    && io::Error::last_os_error().raw_os_error() == Some(libc::ESRCH);
                if empty || libc::setpgid(0, group) == -1 {
                    libc::_exit(0);
                }
            }
            let step = libc::timespec { tv_sec: 0, tv_nsec: STEP.as_nanos() as libc::c_long };
            libc::nanosleep(&raw const step, std::ptr::null_mut());
        }
        libc::kill(-group, libc::SIGKILL);
        libc::_exit(0)
    }
}

/// Closes every descriptor from `first` on. Among them is the one on which the spawning process waits for news of the
/// exec, so leaving it open would block that process.
///
/// # Safety
///
/// Nothing else in the process may rely on its descriptors.
unsafe fn close_from(first: RawFd) {
    // SAFETY: closing what is not open is an error and nothing else.
    unsafe {
        #[cfg(target_os = "linux")]
        if libc::syscall(libc::SYS_close_range, first as libc::c_uint, libc::c_uint::MAX, 0) == 0 {
            return;
        }
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        let known = libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0;
        let last = if known { limit.rlim_cur.min(1 << 20) as RawFd } else { 1 << 16 };
        for fd in first..last {
            libc::close(fd);
        }
    }
}
