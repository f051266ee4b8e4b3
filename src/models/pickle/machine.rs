//! Python's pickle machine, as far as torch's state dicts need it: it builds numbers, texts, tuples, dicts and the
//! names of what Python would call, and calls nothing. Values lie side by side and refer to one another by number, so
//! that neither depth nor sharing costs anything: a pickle of a few hundred bytes can nest a million deep or name one
//! list a thousand times, and this reader would not notice.

use std::collections::HashMap;

/// The most operations of one pickle: a model's tensor takes about forty.
const MAX_OPERATIONS: usize = 4 << 20;

/// A value by its number.
pub type Id = usize;

/// What a pickle consists of.
#[derive(Debug)]
pub enum Value<'a> {
    /// What a state dict may hold and nobody here reads: floats, lists, None.
    Other,
    Int(i64),
    Text(&'a str),
    /// The name of something in a module.
    Global {
        module: &'a str,
        name: &'a str,
    },
    Tuple(Vec<Id>),
    /// Keys and values in their order.
    Dict(Vec<(Id, Id)>),
    /// What calling the first with the second would give.
    Call {
        callable: Id,
        arguments: Id,
    },
    /// Something that is kept outside of the pickle.
    Stored(Id),
}

/// A whole pickle.
#[derive(Debug)]
pub struct Pickled<'a> {
    values: Vec<Value<'a>>,
    root: Id,
}

impl<'a> Pickled<'a> {
    /// The value that the pickle is of.
    pub fn root(&self) -> Id {
        self.root
    }

    pub fn value(&self, id: Id) -> &Value<'a> {
        &self.values[id]
    }

    pub fn text(&self, id: Id) -> Option<&'a str> {
        match self.value(id) {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    pub fn tuple(&self, id: Id) -> Option<&[Id]> {
        match self.value(id) {
            Value::Tuple(items) => Some(items),
            _ => None,
        }
    }

    pub fn dict(&self, id: Id) -> Option<&[(Id, Id)]> {
        match self.value(id) {
            Value::Dict(entries) => Some(entries),
            _ => None,
        }
    }

    /// Whole numbers that are not negative.
    pub fn count(&self, id: Id) -> Option<usize> {
        match self.value(id) {
            Value::Int(number) => usize::try_from(*number).ok(),
            _ => None,
        }
    }

    pub fn counts(&self, id: Id) -> Option<Vec<usize>> {
        self.tuple(id)?.iter().map(|id| self.count(*id)).collect()
    }

    /// Module and name.
    pub fn global(&self, id: Id) -> Option<(&'a str, &'a str)> {
        match self.value(id) {
            Value::Global { module, name } => Some((module, name)),
            _ => None,
        }
    }
}

/// Reads the pickle in `bytes`, of protocol 2, which torch writes.
///
/// # Errors
/// The place and what is wrong there: an operation that no state dict needs, one that lacks its operands, an end too
/// early, more operations than any model has.
pub fn read(bytes: &[u8]) -> Result<Pickled<'_>, String> {
    let mut machine = Machine {
        bytes,
        at: 0,
        values: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    for _ in 0..MAX_OPERATIONS {
        let place = machine.at;
        let ended = machine.step();
        if ended.map_err(|what| format!("byte {place} of the pickle: {what}"))? {
            let root = machine.pop()?;
            let values = machine.values;
            return Ok(Pickled { values, root });
        }
    }
    Err(format!(
        "the pickle has more than {MAX_OPERATIONS} operations"
    ))
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    values: Vec<Value<'a>>,
    stack: Vec<Id>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    /// The next operation; whether it was the last.
    fn step(&mut self) -> Result<bool, String> {
        let [operation] = self.array()?;
        match operation {
            0x80 => drop(self.take(1)?),
            b'.' => return Ok(true),
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Value::Global { module, name });
            }
            b'N' | 0x88 | 0x89 | b']' => self.push(Value::Other),
            b'G' => {
                self.take(8)?;
                self.push(Value::Other);
            }
            b'K' => {
                let [byte] = self.array()?;
                self.push(Value::Int(byte.into()));
            }
            b'M' => {
                let number = u16::from_le_bytes(self.array()?);
                self.push(Value::Int(number.into()));
            }
            b'J' => {
                let number = i32::from_le_bytes(self.array()?);
                self.push(Value::Int(number.into()));
            }
            0x8a => self.long()?,
            b'X' => {
                let length = u32::from_le_bytes(self.array()?);
                let text = std::str::from_utf8(self.take(length as usize)?);
                let text = text.map_err(|_| "a text that is not UTF-8")?;
                self.push(Value::Text(text));
            }
            b'q' | b'r' => {
                let key = self.key(operation == b'q')?;
                let top = *self.stack.last().ok_or("nothing to remember")?;
                self.memo.insert(key, top);
            }
            b'h' | b'j' => {
                let key = self.key(operation == b'h')?;
                let id = self.memo.get(&key);
                let id = *id.ok_or_else(|| format!("{key} was never remembered"))?;
                self.stack.push(id);
            }
            b'(' => self.marks.push(self.stack.len()),
            b')' | 0x85..=0x87 | b't' => self.tuple(operation)?,
            b'}' => self.push(Value::Dict(Vec::new())),
            b's' | b'u' => self.set_items(operation == b's')?,
            b'a' => drop(self.pop()?),
            b'e' => drop(self.above_mark()?),
            b'R' | 0x81 => self.call()?,
            // The state of an object; that of an ordered dict has notes of torch.
            b'b' => drop(self.pop()?),
            b'Q' => {
                let id = self.pop()?;
                self.push(Value::Stored(id));
            }
            other => return Err(format!("operation {other:#04x}, which no state dict needs")),
        }
        Ok(false)
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let taken = self.bytes[self.at..].get(..count);
        let taken = taken.ok_or("the pickle ends too early")?;
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let taken = self.take(N)?;
        taken
            .try_into()
            .map_err(|_| "the pickle ends too early".into())
    }

    /// Up to the next line's end.
    fn line(&mut self) -> Result<&'a str, String> {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().position(|byte| *byte == b'\n');
        let line = self.take(length.ok_or("a name that does not end")?)?;
        self.at += 1;
        let line = std::str::from_utf8(line).map_err(|_| "a name that is not UTF-8")?;
        Ok(line.trim_end_matches('\r'))
    }

    /// A key of the memo, in one byte or in four.
    fn key(&mut self, short: bool) -> Result<u32, String> {
        if short {
            return Ok(self.array::<1>()?[0].into());
        }
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn push(&mut self, value: Value<'a>) {
        self.stack.push(self.values.len());
        self.values.push(value);
    }

    fn pop(&mut self) -> Result<Id, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len() > floor {
            true => self
                .stack
                .pop()
                .ok_or_else(|| "an operand is missing".into()),
            false => Err("an operand is missing".into()),
        }
    }

    fn above_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().ok_or("nothing is marked")?;
        Ok(self.stack.split_off(mark))
    }

    /// A whole number of as many bytes as its first says.
    fn long(&mut self) -> Result<(), String> {
        let [length] = self.array()?;
        let bytes = self.take(length.into())?;
        let negative = bytes.last().is_some_and(|last| last & 0x80 != 0);
        let mut whole = [if negative { 0xFF } else { 0 }; 8];
        self.push(match whole.get_mut(..bytes.len()) {
            Some(low) => {
                low.copy_from_slice(bytes);
                Value::Int(i64::from_le_bytes(whole))
            }
            // Seeds have more bits; no size does.
            None => Value::Other,
        });
        Ok(())
    }

    fn tuple(&mut self, operation: u8) -> Result<(), String> {
        let items = match operation {
            b')' => Vec::new(),
            b't' => self.above_mark()?,
            short => {
                let mut items = Vec::new();
                for _ in 0x84..short {
                    items.push(self.pop()?);
                }
                items.reverse();
                items
            }
        };
        self.push(Value::Tuple(items));
        Ok(())
    }

    fn set_items(&mut self, single: bool) -> Result<(), String> {
        let items = match single {
            true => {
                let (value, key) = (self.pop()?, self.pop()?);
                vec![key, value]
            }
            false => self.above_mark()?,
        };
        let (pairs, rest) = items.as_chunks::<2>();
        let top = *self.stack.last().ok_or("no dict to fill")?;
        match &mut self.values[top] {
            Value::Dict(entries) if rest.is_empty() => {
                entries.extend(pairs.iter().map(|[key, value]| (*key, *value)));
            }
            // Other objects with keys, such as those that a trainer keeps beside.
            Value::Other | Value::Call { .. } if rest.is_empty() => {}
            _ => return Err("keys and values for what is no dict".into()),
        }
        Ok(())
    }

    fn call(&mut self) -> Result<(), String> {
        let (arguments, callable) = (self.pop()?, self.pop()?);
        let called = match &self.values[callable] {
            Value::Global {
                module: "collections",
                name: "OrderedDict" | "defaultdict",
            } => Value::Dict(Vec::new()),
            _ => Value::Call {
                callable,
                arguments,
            },
        };
        self.push(called);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lacks_operands_or_ends_early_is_refused_with_its_place() {
        for (bytes, what) in [
            (&b""[..], "byte 0 of the pickle: the pickle ends too early"),
            (b"\x80\x02", "byte 2"),
            (b"\x80\x02R.", "an operand is missing"),
            (b"}K\x01s.", "no dict to fill"),
            (b"K\x01s.", "an operand is missing"),
            (b"(t(.", "an operand is missing"),
            (b"t.", "nothing is marked"),
            (b"}(K\x01u.", "what is no dict"),
            (b"h\x07.", "7 was never remembered"),
            (b"X\xff\xff\xff\xffa", "ends too early"),
            (b"ctorch", "a name that does not end"),
            (b"P1\n.", "operation 0x50"),
        ] {
            let error = read(bytes).unwrap_err();
            assert!(error.contains(what), "{error}, not {what}");
        }
        assert!(read(&b"N".repeat(MAX_OPERATIONS)).is_err());
    }

    #[test]
    fn depth_sharing_and_cycles_cost_nothing() {
        // A million tuples in one another.
        let deep = [b")".as_slice(), &b"\x85".repeat(1_000_000), b"."].concat();
        assert!(read(&deep).is_ok());
        // Each list holds the one before twice: 2^250 when written out.
        let mut shared = b")q\x00".to_vec();
        for key in 0..250 {
            shared.extend([b'h', key, b'h', key, 0x86, b'q', key + 1]);
        }
        shared.push(b'.');
        assert!(read(&shared).is_ok());
        // A dict that is its own value.
        let own = read(b"}q\x00X\x01\0\0\0ah\x00s.").unwrap();
        assert_eq!(own.dict(own.root()).unwrap()[0].1, own.root());
    }

    #[test]
    fn whole_numbers_of_any_length_are_read() {
        let read_number = |bytes: &[u8]| match read(bytes).unwrap().values.remove(0) {
            Value::Int(number) => Some(number),
            _ => None,
        };
        assert_eq!(read_number(b"\x8a\x02\xff\xff."), Some(-1));
        assert_eq!(read_number(b"\x8a\x00."), Some(0));
        assert_eq!(read_number(b"J\xfe\xff\xff\xff."), Some(-2));
        assert_eq!(
            read_number(b"\x8a\x09\x01\x02\x03\x04\x05\x06\x07\x08\x09."),
            None
        );
    }
}
