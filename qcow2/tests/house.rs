//! The house stays as ARCHITECTURE.md draws it: a module imports only from floors below it, and no files import each
//! other in a circle. Read from the source, so that a new import is judged without anybody thinking of it.

#![allow(clippy::unwrap_used, reason = "what is not there fails the test")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The floors, the ground floor first.
const FLOORS: [&str; 21] = [
    "serial", "units", "format", "error", "storage", "stamp", "journal", "image", "chain", "check", "repair",
    "transfer", "merge", "retire", "compare", "relink", "convert", "facts", "by_name", "ways", "fuzzing",
];

/// A path of names, beginning behind `crate`.
type Names = Vec<String>;

/// A file of the library.
struct SourceFile {
    /// Its module.
    module: Names,
    /// What it uses, resolved, and whether that is a `pub use`, by which others find it here.
    uses: Vec<(Names, bool)>,
}

/// The source without comments, strings and what is compiled for tests alone.
fn code(text: &str) -> String {
    let mut kept = String::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        if line.trim() != "#[cfg(test)]" {
            let line = line.split("//").next().unwrap_or_default();
            kept.extend(line.split('"').step_by(2).chain(["\n"]));
            continue;
        }
        // An item goes to the end of its line, or to the brace in the column where it began.
        while lines.next_if(|line| line.trim_start().starts_with('#')).is_some() {}
        let item = lines.next().unwrap_or_default();
        let close = format!("{}}}", &item[..item.len() - item.trim_start().len()]);
        while !item.ends_with(';') && !item.ends_with('}') {
            match lines.next() {
                Some(line) if line != close => {}
                _ => break,
            }
        }
    }
    kept
}

/// The paths of a tree as `use` has it, `a::{b, c::d}`, which begins with the text; and how much of the text it is.
fn tree(text: &str, before: &[String], all: &mut Vec<Names>) -> usize {
    let mut names = before.to_vec();
    let mut at = 0;
    loop {
        let rest = &text[at..];
        let blank = rest.len() - rest.trim_start().len();
        let rest = rest.trim_start();
        if let Some(inside) = rest.strip_prefix('{') {
            let mut end = 0;
            while !inside[end..].starts_with('}') && end < inside.len() {
                end += tree(&inside[end..], &names, all).max(1);
            }
            return at + blank + end + 2;
        }
        let len = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        if len > 0 {
            names.push(rest[..len].to_owned());
        }
        at += blank + len;
        match text[at..].strip_prefix("::") {
            Some(_) if len > 0 => at += 2,
            _ => break,
        }
    }
    if names.len() > before.len() {
        all.push(names);
    }
    at
}

/// A path as written in a module, from the root of the crate; `None` if it leads out of the crate.
fn resolve(module: &[String], path: &[String], children: &BTreeSet<Names>) -> Option<Names> {
    let mut base = module.to_vec();
    let mut rest = path;
    match path.first()?.as_str() {
        "crate" => (base, rest) = (Vec::new(), &path[1..]),
        "self" => rest = &path[1..],
        "super" => {
            while let Some(("super", more)) = rest.split_first().map(|(first, more)| (first.as_str(), more)) {
                base.pop();
                rest = more;
            }
        }
        child => {
            base.push(child.to_owned());
            if !children.contains(&base) {
                return None;
            }
            rest = &path[1..];
        }
    }
    base.extend(rest.iter().filter(|name| *name != "self").cloned());
    Some(base)
}

/// All paths that a file uses, as written, and whether it exports them again.
fn written(code: &str) -> Vec<(Names, bool)> {
    let mut found = Vec::new();
    let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    for start in ["use ", "crate::", "super::", "self::"] {
        for (at, _) in code.match_indices(start) {
            if code[..at].ends_with(is_word) {
                continue;
            }
            let line = code[..at].rsplit('\n').next().unwrap_or_default().trim();
            let is_use = start == "use ";
            if !is_use && (line.starts_with("use") || line.starts_with("pub") && line.contains("use ")) {
                continue;
            }
            let mut paths = Vec::new();
            tree(if is_use { &code[at + 4..] } else { &code[at..] }, &[], &mut paths);
            found.extend(paths.into_iter().map(|path| (path, is_use && line.starts_with("pub"))));
        }
    }
    found
}

fn files(folder: &Path, module: &[String], all: &mut Vec<(Names, String)>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if name.ends_with("tests") || name == "testing" {
            continue;
        }
        let child = [module, std::slice::from_ref(&name)].concat();
        if path.is_dir() {
            files(&path, &child, all);
        } else {
            let module = if name == "mod" || name == "lib" { module.to_vec() } else { child };
            all.push((module, code(&std::fs::read_to_string(&path).unwrap())));
        }
    }
}

fn house() -> Vec<SourceFile> {
    let mut all = Vec::new();
    files(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src")), &[], &mut all);
    let modules: BTreeSet<Names> = all.iter().map(|(module, _)| module.clone()).collect();
    let sources = all.iter().map(|(module, code)| {
        let uses = written(code);
        let uses =
            uses.into_iter().filter_map(|(path, pub_)| Some((resolve(module, &path, &modules)?, pub_)));
        SourceFile { module: module.clone(), uses: uses.collect() }
    });
    sources.collect()
}

/// The files that each file imports from. What a file exports again is followed to where it is.
fn imports(sources: &[SourceFile]) -> BTreeMap<Names, BTreeSet<Names>> {
    let modules: BTreeSet<&Names> = sources.iter().map(|source| &source.module).collect();
    let exported: BTreeMap<Names, &Names> = sources
        .iter()
        .flat_map(|source| {
            source.uses.iter().filter(|(_, is_pub)| *is_pub).map(move |(path, _)| (source, path))
        })
        .filter_map(|(source, path)| Some(([&source.module[..], &[path.last()?.clone()]].concat(), path)))
        .collect();
    let home = |path: &Names| {
        let mut path = path;
        while let Some(to) =
            (0..=path.len()).find_map(|len| exported.get(&path[..len])).filter(|to| **to != path)
        {
            path = to;
        }
        (0..=path.len()).rev().map(|len| path[..len].to_vec()).find(|module| modules.contains(module))
    };
    let of = |source: &SourceFile| {
        let uses = source.uses.iter().filter(|(_, is_pub)| !is_pub);
        uses.filter_map(|(path, _)| home(path)).filter(|to| *to != source.module).collect()
    };
    sources.iter().map(|source| (source.module.clone(), of(source))).collect()
}

/// Whether a file lies in the folder of a module.
fn is_in(file: &[String], folder: &[String]) -> bool {
    file.len() > folder.len() && file.starts_with(folder)
}

#[test]
fn a_floor_imports_only_from_floors_below_it() {
    let floor = |module: &[String]| module.first().and_then(|name| FLOORS.iter().position(|f| f == name));
    let sources = house();
    let mut judged = 0;
    for source in sources.iter().filter(|source| !source.module.is_empty()) {
        let own =
            floor(&source.module).unwrap_or_else(|| panic!("no floor is named for {:?}", source.module));
        for (path, _) in &source.uses {
            let Some(other) = floor(path) else { continue };
            assert!(other <= own, "{} imports {} from above", source.module.join("::"), path.join("::"));
            judged += usize::from(other < own);
        }
    }
    assert!(judged > 400, "only {judged} imports were found");
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    let mut left = imports(&house());
    // The module that a folder makes may use its files, and they what it defines.
    let folders: Vec<Names> =
        left.keys().filter(|name| left.keys().any(|file| is_in(file, name))).cloned().collect();
    left.retain(|name, _| !folders.contains(name));
    let circles: Vec<String> = left.keys().filter_map(|name| circle(name, &left)).collect();
    assert!(circles.is_empty(), "these import each other:\n{}", circles.join("\n"));
}

/// The shortest way from a file back to itself.
fn circle(name: &Names, imports: &BTreeMap<Names, BTreeSet<Names>>) -> Option<String> {
    let mut ways = vec![vec![name]];
    let mut seen: BTreeSet<&Names> = BTreeSet::new();
    while !ways.is_empty() {
        let mut longer = Vec::new();
        for way in &ways {
            for next in way.last().and_then(|last| imports.get(*last)).into_iter().flatten() {
                if next == name {
                    return Some(way.iter().map(|name| name.join("::")).collect::<Vec<_>>().join(" -> "));
                }
                if seen.insert(next) {
                    longer.push([&way[..], &[next]].concat());
                }
            }
        }
        ways = longer;
    }
    None
}

/// The folders of the workspace's crates.
const CRATES: [&str; 6] = ["qcow2", "qmp-client", "merge-cli", "benches", "fuzz", "testdata/kit"];

/// The name of the type that a line of code begins to define, if it does. The types that an `impl` block names for its
/// trait, as `type Output`, are indented, and say what the trait wants.
fn type_name(line: &str) -> Option<&str> {
    let is_inside = line.starts_with(' ');
    let mut words = line.split(|c: char| c.is_whitespace() || "<({;:=".contains(c)).filter(|w| !w.is_empty());
    let is_visibility = |word: &&str| *word == "pub" || matches!(*word, "crate)" | "super)" | "in" | "crate");
    let word = words.find(|word| !is_visibility(word) && !word.ends_with(')'))?;
    let names_type = matches!(word, "struct" | "enum" | "trait" | "union") || word == "type" && !is_inside;
    let name = words.next().filter(|_| names_type)?;
    name.starts_with(|c: char| c.is_ascii_uppercase()).then_some(name)
}

/// Where each type of a crate is defined, tests included.
fn types(folder: &Path, all: &mut BTreeMap<String, Vec<String>>) {
    let entries = std::fs::read_dir(folder).map(|entries| entries.map(|entry| entry.unwrap().path()));
    for path in entries.into_iter().flatten() {
        if path.is_dir() && !path.ends_with("target") {
            types(&path, all);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            for (at, line) in std::fs::read_to_string(&path).unwrap().lines().enumerate() {
                if let Some(name) = type_name(line) {
                    all.entry(name.to_owned()).or_default().push(format!("{}:{}", path.display(), at + 1));
                }
            }
        }
    }
}

#[test]
fn a_name_means_one_type() {
    for (line, name) in [
        ("pub(in crate::repair) struct Recorded<'a> {", Some("Recorded")),
        ("    enum Answer {", Some("Answer")),
        ("type Names = Vec<String>;", Some("Names")),
        ("    type Output = u64;", None),
        ("pub fn structure(of: Type) {", None),
        ("/// struct Words in a comment", None),
    ] {
        assert_eq!(type_name(line), name, "{line}");
    }
    for name in CRATES {
        let mut all = BTreeMap::new();
        types(&Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name), &mut all);
        let twice: Vec<String> = all
            .iter()
            .filter(|(_, places)| places.len() > 1)
            .map(|(name, places)| format!("{name}: {}", places.join(", ")))
            .collect();
        assert!(
            twice.len() * 100 <= all.len() * 3,
            "{name}: {} of {} names of types stand more than once, which is over 3 %:\n{}",
            twice.len(),
            all.len(),
            twice.join("\n")
        );
        assert!(name != "qcow2" || all.len() > 300, "only {} types were found", all.len());
    }
}
