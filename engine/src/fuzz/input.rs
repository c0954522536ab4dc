//! Fuzz bytes as a stream of numbers, and the same stream written for seeds.

#![forbid(unsafe_code)]

/// Reads numbers off the front; past the end everything is zero.
pub(crate) struct Input<'a> {
    rest: &'a [u8],
}

impl<'a> Input<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Input<'a> {
        Input { rest: bytes }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// At most `most` bytes, fewer at the end.
    pub(crate) fn bytes(&mut self, most: usize) -> &'a [u8] {
        let (taken, rest) = self.rest.split_at(most.min(self.rest.len()));
        self.rest = rest;
        taken
    }

    /// Everything that is left.
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        self.bytes(usize::MAX)
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let taken = self.bytes(N);
        array[..taken.len()].copy_from_slice(taken);
        array
    }

    pub(crate) fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A number below `end`, from one byte.
    pub(crate) fn below(&mut self, end: u8) -> u8 {
        self.u8() % end
    }
}

/// Writes what [`Input`] reads.
#[cfg(test)]
#[derive(Default)]
pub(crate) struct Seed(pub(crate) Vec<u8>);

#[cfg(test)]
impl Seed {
    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Seed {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn u8(self, value: u8) -> Seed {
        self.bytes(&[value])
    }

    pub(crate) fn u16(self, value: u16) -> Seed {
        self.bytes(&value.to_le_bytes())
    }

    pub(crate) fn u64(self, value: u64) -> Seed {
        self.bytes(&value.to_le_bytes())
    }
}
