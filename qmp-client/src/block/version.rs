//! The differences between the supported versions of QEMU: 7.2 and later.

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::qmp::monitor::{Execute, Monitor};

/// The first version that closes the connection to an NBD export in its main thread.
const CLOSES_SAFELY: (u64, u64) = (9, 0);

/// Whether a node can be exported for a moment without harm.
///
/// Before version 9.0 QEMU closes an export's connection in the thread that runs the node's requests. If that
/// is an iothread, QEMU aborts, and the guest with it. So an export is safe there only without iothreads. If
/// something is unknown, the answer is no.
///
/// # Errors
/// [`Error::Disconnected`] and [`Error::TimedOut`]: then there is no answer at all.
pub(crate) fn exports_are_safe(monitor: &(impl Monitor + ?Sized)) -> Result<bool> {
    let closes_safely = version(monitor)?.is_some_and(|version| version >= CLOSES_SAFELY);
    Ok(closes_safely || !may_have_iothreads(monitor)?)
}

/// Major and minor number.
fn version(monitor: &(impl Monitor + ?Sized)) -> Result<Option<(u64, u64)>> {
    let answer = known(monitor, "query-version", json!({}))?;
    let number = |key: &str| answer["qemu"][key].as_u64();
    Ok(number("major").zip(number("minor")))
}

/// Iothreads are objects of the user. A storage daemon has them, too, and only this list shows both.
fn may_have_iothreads(monitor: &(impl Monitor + ?Sized)) -> Result<bool> {
    let answer = known(monitor, "qom-list", json!({"path": "/objects"}))?;
    let Value::Array(objects) = answer else { return Ok(true) };
    Ok(objects.iter().any(|object| object["type"].as_str().is_none_or(|kind| kind.contains("iothread"))))
}

/// The answer; null if QEMU refuses the question.
fn known(monitor: &(impl Monitor + ?Sized), command: &str, arguments: Value) -> Result<Value> {
    match monitor.query(command, arguments) {
        Ok(answer) => Ok(answer),
        Err(Error::Command { .. }) => Ok(Value::Null),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::replay::Replay;

    fn safe(version: Option<&str>, objects: Option<&str>) -> bool {
        let answer = |id: u64, name: &str, value: Option<&str>| {
            value.map_or(String::new(), |value| {
                format!("{{\"execute\":\"{name}\",\"id\":{id}}}\n{{\"return\":{value},\"id\":{id}}}\n")
            })
        };
        let script = answer(1, "query-version", version) + &answer(2, "qom-list", objects);
        exports_are_safe(&Replay::of(&script)).unwrap()
    }

    #[test]
    fn an_old_qemu_with_an_iothread_lets_nobody_export() {
        let of = |major: u32, minor: u32| {
            format!("{{\"qemu\":{{\"major\":{major},\"minor\":{minor},\"micro\":2}}}}")
        };
        let (old, older, new) = (of(8, 2), of(7, 2), of(9, 0));
        let with = r#"[{"name":"type","type":"string"},{"name":"t0","type":"child<iothread>"}]"#;
        let without =
            r#"[{"name":"type","type":"string"},{"name":"ram","type":"child<memory-backend-ram>"}]"#;
        for (version, objects, is_safe) in [
            (Some(&old), Some(with), false),
            (Some(&older), Some(with), false),
            (Some(&older), Some(without), true),
            (Some(&older), None, false),
            (Some(&new), Some(with), true),
            (Some(&new), None, true),
            (None, Some(without), true),
            (None, Some(with), false),
            (None, None, false),
        ] {
            assert_eq!(safe(version.map(String::as_str), objects), is_safe, "{version:?} {objects:?}");
        }
        for odd in ["{}", "[]", "null", r#"{"qemu":{"major":"9"}}"#] {
            assert!(!safe(Some(odd), Some(with)) && safe(Some(odd), Some(without)), "{odd}");
        }
        assert!(!safe(Some(&old), Some("[{}]")) && !safe(Some(&old), Some("7")));
    }
}
