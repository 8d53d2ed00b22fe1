//! A scripted server over a socket pair: what a connection must live through.

use std::io::{BufRead, BufReader};

use serde_json::json;

use super::*;
use crate::qmp::monitor::Execute;

const GREETING: &str = include_str!("../../../testdata/qemu-10.0.2.jsonl");
const SHORT: Duration = Duration::from_millis(30);
const LONG: Duration = Duration::from_secs(300);

/// The far end: reads commands, writes whatever the test tells.
struct Server {
    lines: BufReader<UnixStream>,
}

impl Server {
    fn send(&mut self, text: &str) {
        self.lines.get_mut().write_all(text.as_bytes()).unwrap();
    }

    fn command(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn answer(&mut self, command: &Value, value: &Value) {
        self.send(&format!("{}\r\n", json!({"return": value, "id": command["id"]})));
    }

    fn greet(&mut self) {
        let greeting = GREETING.lines().next().unwrap();
        self.send(&format!("{greeting}\r\n"));
        let command = self.command();
        assert_eq!(command["execute"], "qmp_capabilities");
        self.answer(&command, &json!({}));
    }
}

/// A connection whose far end greets and then follows `script`.
fn connected(script: impl FnOnce(Server) + Send + 'static) -> (Connection, thread::JoinHandle<()>) {
    let (here, there) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || {
        let mut server = Server { lines: BufReader::new(there) };
        server.greet();
        script(server);
    });
    let options = Options { greeting_timeout: LONG, longest_line: 1000, ..Options::default() };
    (Connection::over_stream(here, "the pair", &options).unwrap(), server)
}

fn ask(connection: &Connection, timeout: Duration) -> Result<Value> {
    connection.execute_raw("query-status", Value::Null, timeout)
}

#[test]
fn the_greeting_is_read_and_negotiation_is_left() {
    let (connection, server) = connected(|_| {});
    assert_eq!(connection.version(), (10, 0, 2));
    server.join().unwrap();
}

#[test]
fn a_monitor_that_does_not_greet_is_held_by_another_client() {
    let (here, _there) = UnixStream::pair().unwrap();
    let options = Options { greeting_timeout: SHORT, ..Options::default() };
    let error = Connection::over_stream(here, "/run/vm.sock", &options).unwrap_err();
    assert!(matches!(error, Error::NoGreeting { .. }));
    let text = error.to_string();
    assert!(text.contains("/run/vm.sock") && text.contains("another client holds this monitor"), "{text}");
}

#[test]
fn a_full_queue_of_clients_is_not_waited_for_without_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp.sock");
    let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let first = connect_unix(&path, SHORT).unwrap();
    let options = Options { greeting_timeout: SHORT, ..Options::default() };
    let error = Connection::connect(&Address::Unix(path), &options).unwrap_err();
    assert!(matches!(error, Error::NoGreeting { .. }), "{error}");
    drop(first);
}

#[test]
fn a_late_answer_is_dropped_and_the_next_command_gets_its_own() {
    let (connection, server) = connected(|mut server| {
        let (first, second) = (server.command(), server.command());
        server.answer(&first, &json!("late"));
        server.answer(&second, &json!("in time"));
    });
    assert!(matches!(ask(&connection, SHORT), Err(Error::TimedOut { .. })));
    assert_eq!(ask(&connection, LONG).unwrap(), json!("in time"));
    server.join().unwrap();
}

#[test]
fn commands_of_two_threads_get_their_own_answers_in_any_order() {
    let (connection, server) = connected(|mut server| {
        let (first, second) = (server.command(), server.command());
        for command in [second, first] {
            server.answer(&command, &command["arguments"]["n"]);
        }
    });
    thread::scope(|scope| {
        for n in 0..2 {
            let connection = &connection;
            scope.spawn(move || {
                assert_eq!(connection.execute_raw("x", json!({"n": n}), LONG).unwrap(), json!(n));
            });
        }
    });
    server.join().unwrap();
}

#[test]
fn unknown_events_fields_and_error_classes_are_harmless() {
    let (connection, server) = connected(|mut server| {
        let command = server.command();
        server.send("{\"event\": \"INVENTED_LATER\", \"data\": {\"x\": [1]}, \"new\": 5}\r\n");
        server.send(&format!("{}\r\n", json!({"return": {}, "id": command["id"], "new": 5})));
        let command = server.command();
        let error = json!({"class": "InventedLater", "desc": "not \u{1b}[2J today"});
        server.send(&format!("{}\r\n", json!({"error": error, "id": command["id"]})));
    });
    assert_eq!(ask(&connection, LONG).unwrap(), json!({}));
    let error = ask(&connection, LONG).unwrap_err();
    assert!(!error.to_string().contains('\u{1b}'), "QEMU's words must not command the terminal");
    assert!(matches!(error, Error::Command { failure, .. } if failure.class == "InventedLater"));
    assert_eq!(connection.next_event(LONG).unwrap().unwrap().name, "INVENTED_LATER");
    server.join().unwrap();
}

#[test]
fn an_answer_in_single_bytes_is_an_answer() {
    let (connection, server) = connected(|mut server| {
        let command = server.command();
        for byte in json!({"return": 5, "id": command["id"]}).to_string().chars() {
            server.send(&byte.to_string());
        }
        server.send("\n");
    });
    assert_eq!(ask(&connection, LONG).unwrap(), json!(5));
    server.join().unwrap();
}

#[test]
fn an_answer_that_is_no_json_fails_its_command_only() {
    let (connection, server) = connected(|mut server| {
        server.command();
        server.send("{\"return\": nonsense\r\n");
        let command = server.command();
        server.answer(&command, &json!(6));
    });
    assert!(matches!(ask(&connection, LONG), Err(Error::Unreadable { .. })));
    assert_eq!(ask(&connection, LONG).unwrap(), json!(6));
    server.join().unwrap();
}

#[test]
fn a_huge_answer_fails_its_command_only() {
    let (connection, server) = connected(|mut server| {
        let command = server.command();
        server.answer(&command, &json!("x".repeat(1 << 20)));
        let command = server.command();
        server.answer(&command, &json!(7));
    });
    let error = ask(&connection, LONG).unwrap_err().to_string();
    assert!(error.contains("more than 1000 bytes"), "{error}");
    assert_eq!(ask(&connection, LONG).unwrap(), json!(7));
    server.join().unwrap();
}

#[test]
fn an_error_without_a_number_answers_the_command_that_waits() {
    let (connection, server) = connected(|mut server| {
        server.command();
        server.send("{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error\"}}\r\n");
    });
    assert!(matches!(ask(&connection, LONG), Err(Error::Command { .. })));
    server.join().unwrap();
}

#[test]
fn the_end_of_qemu_wakes_those_who_wait_and_leaves_the_events() {
    let (connection, server) = connected(|mut server| {
        server.command();
        server.send("{\"event\": \"SHUTDOWN\"}\r\n{\"return\": {}, \"id\"");
    });
    assert!(matches!(ask(&connection, LONG), Err(Error::Disconnected { .. })));
    server.join().unwrap();
    assert_eq!(connection.next_event(LONG).unwrap().unwrap().name, "SHUTDOWN");
    assert!(matches!(connection.next_event(LONG), Err(Error::Disconnected { .. })));
    assert!(matches!(ask(&connection, LONG), Err(Error::Disconnected { .. })));
}

#[test]
fn an_answer_of_another_shape_fails_its_command_only() {
    let (connection, server) = connected(|mut server| {
        for value in [json!([{"id": 5}]), json!([])] {
            let command = server.command();
            server.answer(&command, &value);
        }
    });
    let jobs = qapi::qmp::query_jobs {};
    assert!(matches!(connection.execute(&jobs), Err(Error::Answer { .. })));
    assert!(connection.execute(&jobs).unwrap().is_empty());
    server.join().unwrap();
}

#[test]
fn tcp_is_refused_unless_it_is_allowed() {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = Address::Tcp { host: "127.0.0.1".into(), port: listener.local_addr().unwrap().port() };
    let refused = Connection::connect(&address, &Options::default());
    assert!(matches!(refused, Err(Error::TcpNotAllowed { .. })));
    let allowed = Options { allow_tcp: true, greeting_timeout: SHORT, ..Options::default() };
    assert!(matches!(Connection::connect(&address, &allowed), Err(Error::NoGreeting { .. })));
}

#[test]
fn a_stale_socket_says_that_nobody_listens_and_a_new_qemu_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let (address, options) = (Address::Unix(path.clone()), Options::default());
    let error = Connection::connect(&address, &options).unwrap_err().to_string();
    assert!(error.contains("nobody listens"), "{error}");
    let error = Connection::reconnect(&address, &options, SHORT).unwrap_err();
    assert!(matches!(error, Error::Connect { .. }));

    let server = thread::spawn(move || {
        thread::sleep(SHORT);
        std::fs::remove_file(&path).unwrap();
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        Server { lines: BufReader::new(listener.accept().unwrap().0) }.greet();
    });
    assert_eq!(Connection::reconnect(&address, &options, LONG).unwrap().version(), (10, 0, 2));
    server.join().unwrap();
}
