// SPDX-License-Identifier: PostgreSQL

use super::*;

fn mark(text: &str) -> Arc<Mark> {
    Mark::parse("a test", text.into()).unwrap()
}

fn at(position: &str) -> StoredCursor {
    StoredCursor { position: mark(position), target: None, acked: 0, ahead: Vec::new(), windows: Vec::new() }
}

fn begin(cursor: StoredCursor, eras: &[i32]) -> Result<(Reader, FlowProgress), UnknownEra> {
    Reader::new(cursor, Ahead::delivered([]), eras.into())
}

fn texts(piece: Option<Piece>) -> Option<(String, String, i64)> {
    piece.map(|piece| (piece.from.text().to_owned(), piece.to.text().to_owned(), piece.after))
}

fn piece(from: &str, to: &str, after: i64) -> Option<(String, String, i64)> {
    Some((from.into(), to.into(), after))
}

#[test]
fn it_waits_for_a_head_that_is_past_its_position() {
    let (mut reader, mut progress) = begin(at("1|10|10|20:20:|"), &[1]).unwrap();
    assert!(reader.next(None, &mut progress).is_none());
    for not_past in ["1|10|10|20:20:|", "1|9|9|19:19:|", "1|10|10|20:22:20,21|", "2|99|99|99:99:|"] {
        let head = mark(not_past);
        let is_same_snapshot = not_past.contains("20:22");
        let found = reader.next(Some(&head), &mut progress).is_some();
        assert_eq!(found, is_same_snapshot, "{not_past}");
        if found {
            // Nothing new is visible there, but it was read later: the window is empty.
            reader.read(10, true);
            progress.scanned(10, true);
            (reader, progress) = begin(at("1|10|10|20:20:|"), &[1]).unwrap();
        }
    }
    let head = mark("1|12|12|23:23:|");
    assert_eq!(
        texts(reader.next(Some(&head), &mut progress)),
        piece("1|10|10|20:20:|", "1|12|12|23:23:|", 0)
    );
}

#[test]
fn a_head_that_does_not_see_what_the_position_sees_is_older() {
    let (mut reader, mut progress) = begin(at("1|10|10|22:22:|"), &[1]).unwrap();
    let older = mark("1|10|10|20:22:20|");
    assert!(reader.next(Some(&older), &mut progress).is_none());
}

#[test]
fn windows_follow_one_another_page_by_page() {
    let (mut reader, mut progress) = begin(at("1|0|0|3:3:|"), &[1]).unwrap();
    let (first, second) = (mark("1|5|5|9:9:|"), mark("1|8|8|12:12:|"));
    assert_eq!(texts(reader.next(Some(&first), &mut progress)), piece("1|0|0|3:3:|", "1|5|5|9:9:|", 0));
    reader.read(3, false);
    assert_eq!(texts(reader.next(Some(&second), &mut progress)), piece("1|0|0|3:3:|", "1|5|5|9:9:|", 3));
    reader.read(5, true);
    assert_eq!(texts(reader.next(Some(&second), &mut progress)), piece("1|5|5|9:9:|", "1|8|8|12:12:|", 0));
    reader.read(8, true);
    assert!(reader.next(Some(&second), &mut progress).is_none());
}

#[test]
fn a_window_that_was_left_is_read_to_its_end_first() {
    let cursor = StoredCursor { target: Some(mark("1|5|5|9:9:|")), acked: 4, ..at("1|0|0|3:3:|") };
    let (mut reader, mut progress) = begin(cursor, &[1]).unwrap();
    assert_eq!(progress.frontier().acked, 4);
    let head = mark("1|8|8|12:12:|");
    assert_eq!(texts(reader.next(Some(&head), &mut progress)), piece("1|0|0|3:3:|", "1|5|5|9:9:|", 4));
}

#[test]
fn older_eras_are_drained_first() {
    let (mut reader, mut progress) = begin(at("7|5|5|9:9:|"), &[7, 8, 9]).unwrap();
    let head = mark("9|8|8|12:12:|");
    let end = |era| Position::end_of_era(era).to_string();
    let start = |era| Position::start_of_era(era).to_string();
    assert_eq!(texts(reader.next(Some(&head), &mut progress)), piece("7|5|5|9:9:|", &end(7), 0));
    reader.read(6, true);
    progress.scanned(6, true);
    progress.advance(&mut Vec::new());
    assert_eq!(progress.frontier().position.text(), start(8));
    assert_eq!(texts(reader.next(Some(&head), &mut progress)), piece(&start(8), &end(8), 0));
    reader.read(6, true);
    assert_eq!(texts(reader.next(Some(&head), &mut progress)), piece(&start(9), "9|8|8|12:12:|", 0));
}

#[test]
fn a_cursor_in_the_end_of_an_era_goes_on_in_the_next() {
    let end = Position::end_of_era(7).to_string();
    let cursor = StoredCursor { target: Some(mark(&end)), acked: 4, ..at("7|1|1|3:3:|") };
    let (mut reader, mut progress) = begin(cursor, &[7, 8]).unwrap();
    assert_eq!(texts(reader.next(None, &mut progress)), piece("7|1|1|3:3:|", &end, 4));
    reader.read(6, true);
    assert_eq!(reader.position.era(), 8);
    assert_eq!(begin(at(&end), &[7, 8]).map(|(reader, _)| reader.position.era()), Ok(8));
    assert!(begin(at(&end), &[7]).is_err());
    assert!(begin(at("3|1|1|3:3:|"), &[7]).is_err());
}
