//! The simulated disk's mappings: what is lent, and that nobody writes under its reader.

use super::*;

pub(super) struct SimData {
    pub(super) fs: SimFs,
    pub(super) inode: usize,
    pub(super) map: usize,
    pub(super) mapped: Range<usize>,
}

impl SimData {
    /// Where `range` is in the file, if it is mapped.
    fn place(&self, range: ByteRange) -> Range<usize> {
        let range = span(range);
        let inside = self.mapped.start <= range.start && range.end <= self.mapped.end;
        assert!(inside, "what is not mapped was asked for");
        range
    }
}

pub(super) fn span(range: ByteRange) -> Range<usize> {
    range.start() as usize..range.end() as usize
}

impl MappedData for SimData {
    fn populate(&self, range: ByteRange) -> io::Result<()> {
        let mut world = self.fs.world();
        world.step()?;
        let bytes = world.inodes[self.inode].cache.get(self.place(range));
        bytes.map(drop).ok_or(io::ErrorKind::UnexpectedEof.into())
    }

    unsafe fn lend(self: Arc<Self>, range: ByteRange) -> io::Result<LentBytes> {
        let mut world = self.fs.world();
        world.step()?;
        let range = self.place(range);
        let bytes: Arc<[u8]> = world.inodes[self.inode]
            .cache
            .get(range.clone())
            .ok_or(io::ErrorKind::UnexpectedEof)?
            .into();
        let stale = world.detached[self.map].iter().any(|d| overlap(d, &range));
        assert!(!stale, "what shows a copy was lent again");
        world.loan_count += 1;
        let number = world.loan_count;
        let loan = Loan {
            inode: self.inode,
            map: self.map,
            range,
            bytes: bytes.to_vec(),
        };
        world.loans.insert(number, loan);
        drop(world);
        Ok(Box::new(SimLent {
            map: self,
            number,
            bytes,
        }))
    }

    unsafe fn detach(&self, offset: u64, copy: &[u8]) -> io::Result<()> {
        let mut world = self.fs.world();
        world.step()?;
        let start = offset as usize;
        let range = start..start + copy.len();
        for loan in world.loans.values().filter(|loan| loan.map == self.map) {
            let same = both(&range, &loan.range);
            if same.is_empty() {
                continue;
            }
            let copied = &copy[same.start - start..][..same.len()];
            let shown = &loan.bytes[same.start - loan.range.start..][..same.len()];
            assert!(copied == shown, "bytes changed under their reader");
        }
        world.detached[self.map].push(range);
        Ok(())
    }

    unsafe fn release(&self, range: ByteRange) -> io::Result<()> {
        let mut world = self.fs.world();
        let range = self.place(range);
        let mut loans = world.loans.values();
        let lent = loans.any(|loan| loan.map == self.map && overlap(&loan.range, &range));
        assert!(!lent, "memory was given back under its reader");
        world.step()
    }
}

struct SimLent {
    map: Arc<SimData>,
    number: usize,
    bytes: Arc<[u8]>,
}

impl AsRef<[u8]> for SimLent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for SimLent {
    fn drop(&mut self) {
        self.map.fs.world().loans.remove(&self.number);
    }
}

pub(super) struct SimMap(pub(super) SimFs, pub(super) usize);

impl MappedFile for SimMap {
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let start = offset as usize;
        let world = self.0.world();
        let bytes = world.inodes[self.1].cache.get(start..start + out.len());
        out.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}
