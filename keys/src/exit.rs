//! The exit codes of every Leasehold command, so that a script can tell a no from a failure.

/// Why a command ended as it did. The numbers are stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Exit {
    /// It did what was asked.
    Ok = 0,
    /// A check said no: a signature, a proof, an admission.
    No = 1,
    /// The command line is wrong.
    Usage = 2,
    /// A file could not be read or written, or is not what it should be.
    Io = 3,
    /// A key is locked and no passphrase was given, or the wrong one.
    Locked = 4,
    /// A rule forbids it: file modes, limits, an expired object, another key.
    Policy = 5,
    /// A node or the network failed.
    Remote = 6,
    /// It exists already, or exists differently.
    Conflict = 7,
}

impl Exit {
    /// The number.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}
