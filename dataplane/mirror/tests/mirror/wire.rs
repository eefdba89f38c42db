//! A client that says exactly what it is told to, byte for byte.

use std::net::SocketAddr;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

/// A reply, and whether all of it came.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    pub(crate) is_whole: bool,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(n, _)| n.eq_ignore_ascii_case(name))
            .map(|(_, v)| v.as_str())
    }
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// A connection.
pub(crate) struct Wire<S = TcpStream> {
    pub(crate) stream: S,
    ahead: Vec<u8>,
}

impl Wire {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        Self::over(TcpStream::connect(address).await.unwrap())
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    pub(crate) fn over(stream: S) -> Self {
        Self {
            stream,
            ahead: Vec::new(),
        }
    }

    pub(crate) async fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).await.unwrap();
    }

    /// One request with these header lines, and its reply.
    pub(crate) async fn ask(&mut self, method: &str, target: &str, lines: &[&str]) -> Answer {
        let mut text = format!("{method} {target} HTTP/1.1\r\nHost: mirror\r\n");
        for line in lines {
            text.push_str(line);
            text.push_str("\r\n");
        }
        text.push_str("\r\n");
        self.send(&text).await;
        self.answer(method == "HEAD").await
    }

    pub(crate) async fn get(&mut self, target: &str, lines: &[&str]) -> Answer {
        self.ask("GET", target, lines).await
    }

    /// Reads more; false at the end. A reset is an end: it may overtake the bytes before it.
    async fn more(&mut self) -> bool {
        let mut buf = vec![0; 65_536];
        match self.stream.read(&mut buf).await {
            Ok(0) | Err(_) => false,
            Ok(n) => {
                self.ahead.extend_from_slice(&buf[..n]);
                true
            }
        }
    }

    /// The next reply.
    pub(crate) async fn answer(&mut self, is_head: bool) -> Answer {
        let end = loop {
            if let Some(at) = self.ahead.windows(4).position(|w| w == b"\r\n\r\n") {
                break at;
            }
            assert!(self.more().await, "closed before a reply: {:?}", self.ahead);
        };
        let head = String::from_utf8(self.ahead.drain(..end + 4).collect()).unwrap();
        let mut lines = head.trim_end().split("\r\n");
        let status_line = lines.next().unwrap();
        let status = status_line.split(' ').nth(1).unwrap().parse().unwrap();
        let headers = lines
            .map(|line| line.split_once(':').unwrap())
            .map(|(n, v)| (n.to_ascii_lowercase(), v.trim().to_owned()))
            .collect();
        let mut answer = Answer {
            status,
            headers,
            body: Vec::new(),
            is_whole: true,
        };
        if is_head || status == 304 || status == 204 {
            return answer;
        }
        if answer.header("transfer-encoding").is_some() {
            answer.is_whole = self.chunked(&mut answer.body).await;
        } else if let Some(len) = answer.header("content-length").map(|v| v.parse().unwrap()) {
            while self.ahead.len() < len && self.more().await {}
            answer.is_whole = self.ahead.len() >= len;
            let len = len.min(self.ahead.len());
            answer.body = self.ahead.drain(..len).collect();
        }
        answer
    }

    async fn chunked(&mut self, body: &mut Vec<u8>) -> bool {
        loop {
            let line = loop {
                if let Some(at) = self.ahead.windows(2).position(|w| w == b"\r\n") {
                    break String::from_utf8(self.ahead.drain(..at + 2).collect()).unwrap();
                }
                if !self.more().await {
                    return false;
                }
            };
            let len = usize::from_str_radix(line.trim(), 16).unwrap();
            while self.ahead.len() < len + 2 {
                if !self.more().await {
                    return false;
                }
            }
            body.extend(self.ahead.drain(..len));
            self.ahead.drain(..2);
            if len == 0 {
                return true;
            }
        }
    }

    /// Whether the server closes the connection (and says nothing more).
    pub(crate) async fn is_closed(&mut self) -> bool {
        !self.more().await && self.ahead.is_empty()
    }
}
