//! A config file as it is written: the right keys with the right types, nothing decided yet.
//!
//! It is read from the syntax tree instead of through serde's derive, because a tree remembers where everything
//! stands: so all problems of a file are told at once, each with its line, and a key that is given twice is seen.

use jsonc_parser::{
    CollectOptions, ParseOptions,
    ast::{self, Value},
    common::Ranged,
    parse_to_ast,
};

use super::problem::{Place, Problems};

/// The whole file.
#[derive(Default)]
pub(super) struct RawFile {
    pub(super) listen: Option<Placed<String>>,
    pub(super) sse: Option<Placed<bool>>,
    pub(super) naming: Option<Placed<String>>,
    pub(super) separator: Option<Placed<String>>,
    pub(super) servers: Vec<RawServer>,
}

/// One entry of `mcpServers`.
pub(super) struct RawServer {
    pub(super) name: Placed<String>,
    /// Whether reading it found no problem. If it did, one that follows from it is not worth telling.
    pub(super) intact: bool,
    pub(super) kind: Option<Placed<String>>,
    pub(super) command: Option<Placed<String>>,
    pub(super) args: Option<Strings>,
    pub(super) env: Option<Pairs>,
    pub(super) cwd: Option<Placed<String>>,
    pub(super) url: Option<Placed<String>>,
    pub(super) headers: Option<Pairs>,
    pub(super) allow: Option<Strings>,
    pub(super) deny: Option<Strings>,
    pub(super) enabled: Option<Placed<bool>>,
    pub(super) disabled: Option<Placed<bool>>,
    pub(super) timeout: Option<Placed<RawTime>>,
    pub(super) concurrency: Option<Placed<f64>>,
    pub(super) isolation: Option<Placed<String>>,
}

/// A time, in one of its two spellings.
pub(super) enum RawTime {
    Seconds(f64),
    Text(String),
}

/// A value, and where it stands.
pub(super) struct Placed<T> {
    pub(super) value: T,
    pub(super) place: Place,
}

/// A list of strings.
pub(super) type Strings = Placed<Vec<Placed<String>>>;

/// An object of strings, in its order.
pub(super) type Pairs = Placed<Vec<(String, Placed<String>)>>;

/// Why there is nothing to read.
pub(super) enum Unparsable {
    Empty,
    Syntax { at: (usize, usize), text: String },
}

/// Reads the text. What is wrong inside goes to `problems`.
pub(super) fn read(text: &str, problems: &mut Problems) -> Result<RawFile, Unparsable> {
    let parsed = parse_to_ast(text, &CollectOptions::default(), &SYNTAX).map_err(|error| {
        let at = (error.line_display(), error.column_display());
        Unparsable::Syntax { at, text: lower_first(&error.kind().to_string()) }
    })?;
    let root = Node { value: parsed.value.ok_or(Unparsable::Empty)?, place: Place::default() };
    Ok(Reader { text, problems }.file(root).unwrap_or_default())
}

/// JSON with comments and trailing commas, which is what other clients' files have; not more.
const SYNTAX: ParseOptions = ParseOptions {
    allow_comments: true,
    allow_trailing_commas: true,
    allow_loose_object_property_names: false,
    allow_missing_commas: false,
    allow_single_quoted_strings: false,
    allow_hexadecimal_numbers: false,
    allow_unary_plus_numbers: false,
    allow_bare_decimal_point_numbers: false,
    allow_non_finite_numbers: false,
    allow_extended_string_escapes: false,
};

// === the shape of a file ===

struct Reader<'a, 'p> {
    text: &'a str,
    problems: &'p mut Problems,
}

impl<'a> Reader<'a, '_> {
    fn file(&mut self, root: Node<'a>) -> Option<RawFile> {
        let mut keys = self.object(root)?;
        // Editors put it there, for themselves.
        keys.take("$schema");
        let file = RawFile {
            listen: keys.take("listen").and_then(|node| self.string(node)),
            sse: keys.take("sse").and_then(|node| self.boolean(node)),
            naming: keys.take("naming").and_then(|node| self.string(node)),
            separator: keys.take("separator").and_then(|node| self.string(node)),
            servers: self.servers(&mut keys),
        };
        self.refuse_others(keys);
        Some(file)
    }

    /// `servers` is how VS Code spells `mcpServers`.
    fn servers(&mut self, keys: &mut Keys<'a>) -> Vec<RawServer> {
        let servers = match (keys.take("mcpServers"), keys.take("servers")) {
            (Some(servers), Some(twin)) => {
                self.problems.add(&twin.place, "is another spelling of `mcpServers`, which is there too");
                Some(servers)
            }
            (servers, twin) => servers.or(twin),
        };
        let Some(servers) = servers.and_then(|node| self.object(node)) else { return Vec::new() };
        let entries = servers.entries.into_iter();
        entries.filter_map(|(name, node)| self.server(name, node)).collect()
    }

    fn server(&mut self, name: String, node: Node<'a>) -> Option<RawServer> {
        let before = self.problems.count();
        let name = Placed { value: name, place: node.place.clone() };
        let mut keys = self.object(node)?;
        let mut server = RawServer {
            name,
            intact: true,
            kind: keys.take("type").and_then(|node| self.string(node)),
            command: keys.take("command").and_then(|node| self.string(node)),
            args: keys.take("args").and_then(|node| self.strings(node)),
            env: keys.take("env").and_then(|node| self.map(node)),
            cwd: keys.take("cwd").and_then(|node| self.string(node)),
            url: keys.take("url").and_then(|node| self.string(node)),
            headers: keys.take("headers").and_then(|node| self.map(node)),
            allow: keys.take("allow").and_then(|node| self.strings(node)),
            deny: keys.take("deny").and_then(|node| self.strings(node)),
            enabled: keys.take("enabled").and_then(|node| self.boolean(node)),
            disabled: keys.take("disabled").and_then(|node| self.boolean(node)),
            timeout: keys.take("timeout").and_then(|node| self.time(node)),
            concurrency: keys.take("concurrency").and_then(|node| self.number(node)),
            isolation: keys.take("isolation").and_then(|node| self.string(node)),
        };
        self.refuse_others(keys);
        server.intact = self.problems.count() == before;
        Some(server)
    }

    // === values ===

    fn string(&mut self, node: Node<'a>) -> Option<Placed<String>> {
        match node.value {
            Value::StringLit(text) => Some(Placed { value: text.value.into_owned(), place: node.place }),
            _ => self.refuse(&node, "a string"),
        }
    }

    fn strings(&mut self, node: Node<'a>) -> Option<Strings> {
        let Value::Array(array) = node.value else { return self.refuse(&node, "a list of strings") };
        let items = array.elements.into_iter().enumerate().filter_map(|(index, value)| {
            let place = node.place.index(value.range().start, index);
            self.string(Node { value, place })
        });
        Some(Placed { value: items.collect(), place: node.place })
    }

    fn map(&mut self, node: Node<'a>) -> Option<Pairs> {
        let keys = self.object(node)?;
        let pairs =
            keys.entries.into_iter().filter_map(|(key, node)| Some((key, self.string(node)?))).collect();
        Some(Placed { value: pairs, place: keys.place })
    }

    fn boolean(&mut self, node: Node<'a>) -> Option<Placed<bool>> {
        match node.value {
            Value::BooleanLit(found) => Some(Placed { value: found.value, place: node.place }),
            _ => self.refuse(&node, "true or false"),
        }
    }

    fn number(&mut self, node: Node<'a>) -> Option<Placed<f64>> {
        match &node.value {
            Value::NumberLit(found) => match found.value.parse() {
                Ok(value) => Some(Placed { value, place: node.place }),
                Err(_) => self.refuse(&node, "a number"),
            },
            _ => self.refuse(&node, "a number"),
        }
    }

    fn time(&mut self, node: Node<'a>) -> Option<Placed<RawTime>> {
        match node.value {
            Value::StringLit(text) => {
                Some(Placed { value: RawTime::Text(text.value.into_owned()), place: node.place })
            }
            Value::NumberLit(_) => {
                let Placed { value, place } = self.number(node)?;
                Some(Placed { value: RawTime::Seconds(value), place })
            }
            _ => self.refuse(&node, "a number of seconds, or a string such as \"5s\""),
        }
    }

    /// The object's keys, each once.
    fn object(&mut self, node: Node<'a>) -> Option<Keys<'a>> {
        let Value::Object(object) = node.value else { return self.refuse(&node, "an object") };
        let mut entries: Vec<(String, Node<'a>)> = Vec::with_capacity(object.properties.len());
        for ast::ObjectProp { name, value, range } in object.properties {
            let key = name.into_string();
            let place = node.place.key(range.start, &key);
            // Few keys an object has: a search beats a set.
            if let Some((_, first)) = entries.iter().find(|(known, _)| *known == key) {
                let (line, _) = super::problem::line_and_column(self.text, first.place.offset);
                self.problems.add(&place, format!("is given twice, first on line {line}"));
                continue;
            }
            entries.push((key, Node { value, place }));
        }
        Some(Keys { entries, known: Vec::new(), place: node.place })
    }

    fn refuse<T>(&mut self, node: &Node<'a>, wanted: &str) -> Option<T> {
        let found = match node.value {
            Value::StringLit(_) => "a string",
            Value::NumberLit(_) => "a number",
            Value::BooleanLit(_) => "true or false",
            Value::Object(_) => "an object",
            Value::Array(_) => "a list",
            Value::NullKeyword(_) => "null",
        };
        self.problems.add(&node.place, format!("must be {wanted}, not {found}"));
        None
    }

    /// Refuses the keys that nobody took.
    fn refuse_others(&mut self, keys: Keys<'a>) {
        for (key, node) in &keys.entries {
            let said = match nearest(key, &keys.known) {
                Some(right) => format!("unknown key, did you mean `{right}`?"),
                None => format!("unknown key; known here: {}", keys.known.join(", ")),
            };
            self.problems.add(&node.place, said);
        }
    }
}

// === the tree ===

struct Node<'a> {
    value: Value<'a>,
    place: Place,
}

/// An object's keys that are not taken yet.
struct Keys<'a> {
    entries: Vec<(String, Node<'a>)>,
    known: Vec<&'static str>,
    place: Place,
}

impl<'a> Keys<'a> {
    fn take(&mut self, key: &'static str) -> Option<Node<'a>> {
        self.known.push(key);
        let at = self.entries.iter().position(|(found, _)| found == key)?;
        Some(self.entries.remove(at).1)
    }
}

// === suggestions ===

/// The known key that was probably meant.
fn nearest(key: &str, known: &[&'static str]) -> Option<&'static str> {
    let plain = |key: &str| key.to_lowercase().replace(['-', '_', ' '], "");
    let written = plain(key);
    let distance = |right: &str| strsim::damerau_levenshtein(&written, &plain(right));
    let by_spelling = known.iter().copied().min_by_key(|right| distance(right));
    let near = by_spelling.filter(|right| distance(right) <= (right.len() / 3).max(1));
    near.or_else(|| {
        let meaning = OTHER_WORDS.iter().find(|(_, words)| words.contains(&&*written));
        meaning.map(|(right, _)| *right).filter(|right| known.contains(right))
    })
}

/// What other clients and other habits call our keys, in small letters.
const OTHER_WORDS: &[(&str, &[&str])] = &[
    ("command", &["cmd", "program", "exec"]),
    ("args", &["arguments", "parameters"]),
    ("env", &["environment", "envvars"]),
    ("cwd", &["dir", "directory", "workingdirectory", "workdir"]),
    ("url", &["serverurl", "httpurl", "endpoint", "address"]),
    ("type", &["transport", "transporttype", "protocol"]),
    ("headers", &["httpheaders", "requestheaders"]),
    ("allow", &["tools", "includetools", "allowedtools", "enabledtools", "include"]),
    ("deny", &["excludetools", "disabledtools", "deniedtools", "exclude", "block"]),
    ("timeout", &["timeoutms", "requesttimeout", "timeoutseconds"]),
    ("concurrency", &["maxconcurrency", "concurrencylimit"]),
    ("isolation", &["isolated", "sharing", "shared", "persession"]),
    ("listen", &["bind", "address", "host", "port"]),
    ("naming", &["namingmode", "prefix"]),
    ("mcpServers", &["upstreams", "backends"]),
];

fn lower_first(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_lowercase().chain(chars).collect())
}
