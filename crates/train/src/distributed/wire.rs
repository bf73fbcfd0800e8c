//! What goes over a connection: frames of an operation's number and a length that is checked before anything is allocated.

use std::io::{self, Read, Write};

/// Bytes of a frame, at most: a piece of a large thing (larger things go in pieces).
pub(super) const PIECE: usize = 4 << 20;

/// "cashtag" and the version of this protocol.
const MAGIC: [u8; 8] = *b"cashtag1";

fn bad(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// A frame of operation `op`; both sides count operations, so ranks that do different things notice.
pub(super) fn send(stream: &mut impl Write, op: u64, bytes: &[u8]) -> io::Result<()> {
    let mut head = [0; 12];
    head[..8].copy_from_slice(&op.to_le_bytes());
    head[8..].copy_from_slice(&(bytes.len() as u32).to_le_bytes());
    stream.write_all(&head)?;
    stream.write_all(bytes)
}

/// The frame of operation `op`, of `most` bytes at most.
pub(super) fn receive(stream: &mut impl Read, op: u64, most: usize) -> io::Result<Vec<u8>> {
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    let found = u64::from_le_bytes(head[..8].try_into().unwrap_or_default());
    let len = u32::from_le_bytes(head[8..].try_into().unwrap_or_default()) as usize;
    if found != op {
        return Err(bad(format!("is at operation {found}, this rank at {op}")));
    }
    if len > most {
        return Err(bad(format!("sent {len} bytes where {most} at most are expected")));
    }
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Messages of the run.
    Work = 1,
    /// Nothing is said on it but good-bye: its end without that is the end of the process.
    Life = 2,
}

/// Who connects, and for which job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) purpose: Purpose,
    pub(super) rank: usize,
    pub(super) size: usize,
    pub(super) job: [u8; 32],
}

impl Hello {
    pub(super) fn send(&self, stream: &mut impl Write) -> io::Result<()> {
        let mut bytes = MAGIC.to_vec();
        bytes.push(self.purpose as u8);
        bytes.extend((self.rank as u32).to_le_bytes());
        bytes.extend((self.size as u32).to_le_bytes());
        bytes.extend(self.job);
        stream.write_all(&bytes)
    }

    /// `None` if that is nobody of ours.
    pub(super) fn receive(stream: &mut impl Read) -> Option<Self> {
        let mut bytes = [0; 49];
        stream.read_exact(&mut bytes).ok()?;
        let number = |at: usize| Some(u32::from_le_bytes(bytes[at..at + 4].try_into().ok()?) as usize);
        let purpose = match bytes[8] {
            1 => Purpose::Work,
            2 => Purpose::Life,
            _ => return None,
        };
        let job = bytes[17..].try_into().ok()?;
        (bytes[..8] == MAGIC).then_some(Self { purpose, rank: number(9)?, size: number(13)?, job })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_and_what_is_none() {
        let mut wire = Vec::new();
        send(&mut wire, 7, b"abc").unwrap();
        assert_eq!(receive(&mut &wire[..], 7, 3).unwrap(), b"abc");
        let said = |op, most| receive(&mut &wire[..], op, most).unwrap_err().to_string();
        assert_eq!(said(8, 3), "is at operation 7, this rank at 8");
        assert_eq!(said(7, 2), "sent 3 bytes where 2 at most are expected");
        assert!(receive(&mut &wire[..wire.len() - 1], 7, 3).is_err());
        let hello = Hello { purpose: Purpose::Life, rank: 1, size: 2, job: [9; 32] };
        let mut wire = Vec::new();
        hello.send(&mut wire).unwrap();
        assert_eq!(Hello::receive(&mut &wire[..]), Some(hello));
        assert_eq!(
            Hello::receive(&mut &b"GET / HTTP/1.1\r\nHost: a\r\nAccept: */*\r\nUser-Agent: x\r\n\r\n"[..]),
            None
        );
        assert_eq!(Hello::receive(&mut &wire[..48]), None);
    }
}
