//! An array of JSON objects, read as JSON lines: one element a line, in constant memory.
//!
//! Only the structure is followed (strings, brackets, commas between elements); whether an element is JSON is seen by
//! whoever parses the line.

use std::io::Read;

/// Turns `[{…}, {…}]` into `{…}\n{…}\n` on the way through.
pub(super) struct ArrayLines<R> {
    source: R,
    depth: u32,
    in_string: bool,
    escaped: bool,
}

impl<R: Read> ArrayLines<R> {
    pub(super) fn new(source: R) -> Self {
        Self { source, depth: 0, in_string: false, escaped: false }
    }

    /// What stands in the lines for a byte of the array; never more than the byte.
    fn byte(&mut self, byte: u8) -> Option<u8> {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            // A raw line break in a string is an error in JSON, and stays one: the line will end inside the string.
            return Some(byte);
        }
        match byte {
            b'"' => self.in_string = true,
            b'[' | b'{' => {
                self.depth = self.depth.saturating_add(1);
                if self.depth == 1 {
                    return (byte == b'{').then_some(byte);
                }
            }
            b']' | b'}' => {
                self.depth = self.depth.saturating_sub(1);
                if self.depth == 0 {
                    return Some(if byte == b']' { b'\n' } else { byte });
                }
            }
            b',' if self.depth == 1 => return Some(b'\n'),
            b'\n' | b'\r' => return Some(b' '),
            _ => {}
        }
        Some(byte)
    }
}

impl<R: Read> Read for ArrayLines<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        loop {
            let read = self.source.read(buffer)?;
            let mut kept = 0;
            for index in 0..read {
                if let Some(byte) = self.byte(buffer[index]) {
                    buffer[kept] = byte;
                    kept += 1;
                }
            }
            // Nothing kept of something read is not the end.
            if kept > 0 || read == 0 {
                return Ok(kept);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(array: &str) -> Vec<String> {
        let mut out = String::new();
        ArrayLines::new(array.as_bytes()).read_to_string(&mut out).unwrap();
        out.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect()
    }

    #[test]
    fn elements_become_lines() {
        let array = "[\n  {\"a\": \"x, ] \\\" [\", \"b\": [1,\n 2]},\n  {\"a\": {\"c\": []}}\n]\n";
        assert_eq!(lines(array), ["{\"a\": \"x, ] \\\" [\", \"b\": [1,  2]}", "{\"a\": {\"c\": []}}"]);
        assert!(lines("[]").is_empty());
        assert_eq!(lines("[1, \"a,b\"]"), ["1", "\"a,b\""]);
    }
}
